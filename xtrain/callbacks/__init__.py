"""Callbacks: code that watches a training from outside of the module."""

from xtrain.callbacks.base import Callback as Callback
from xtrain.callbacks.checkpoint import ModelCheckpoint as ModelCheckpoint
from xtrain.callbacks.early_stopping import EarlyStopping as EarlyStopping
from xtrain.callbacks.lambda_function import LambdaCallback as LambdaCallback
from xtrain.callbacks.learning_rate import LearningRateMonitor as LearningRateMonitor
from xtrain.callbacks.prediction_writer import BasePredictionWriter as BasePredictionWriter
from xtrain.callbacks.profiler import Profiler as Profiler
from xtrain.callbacks.progress import ProgressBar as ProgressBar
from xtrain.callbacks.progress import TQDMProgressBar as TQDMProgressBar
from xtrain.callbacks.rich_progress import RichProgressBar as RichProgressBar
from xtrain.callbacks.summary import ModelSummary as ModelSummary
from xtrain.callbacks.timer import Timer as Timer
from xtrain.callbacks.weight_averaging import EMAWeightAveraging as EMAWeightAveraging
from xtrain.callbacks.weight_averaging import WeightAveraging as WeightAveraging

__all__ = [
    "BasePredictionWriter",
    "Callback",
    "EMAWeightAveraging",
    "EarlyStopping",
    "LambdaCallback",
    "LearningRateMonitor",
    "ModelSummary",
    "Profiler",
    "ProgressBar",
    "RichProgressBar",
    "TQDMProgressBar",
    "Timer",
    "WeightAveraging",
]
