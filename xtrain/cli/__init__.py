"""The command ``xtrain``, and `LightningCLI`, which makes a command line from the signature of a module."""

from xtrain.cli.command import main as main
from xtrain.cli.lightning import ArgsType as ArgsType
from xtrain.cli.lightning import LightningCLI as LightningCLI
from xtrain.cli.lightning import ReduceLROnPlateau as ReduceLROnPlateau
from xtrain.cli.lightning import SaveConfigCallback as SaveConfigCallback
from xtrain.compat.imports import complete

__all__ = ["ArgsType", "LightningCLI", "ReduceLROnPlateau", "SaveConfigCallback", "main"]

complete(__name__)
