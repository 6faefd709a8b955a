"""``python -m xtrain`` is the command ``xtrain``."""

import sys

from xtrain.cli.command import main

sys.exit(main())
