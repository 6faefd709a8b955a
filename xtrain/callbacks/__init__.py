"""Callbacks: code that watches a training from outside of the module."""

from xtrain.callbacks.base import Callback as Callback
from xtrain.callbacks.progress import ProgressBar as ProgressBar

__all__ = ["Callback", "ProgressBar"]
