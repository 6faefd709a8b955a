"""Everything in this folder rehearses on the CPU, in this process and in those it starts."""

import os

os.environ["PJRT_DEVICE"] = "CPU"
