"""xtrain: one hand-written training step, on CPU, CUDA-AMP, TPU and DeepSpeed, chosen by a flag."""

from xtrain.callbacks import Callback as Callback
from xtrain.callbacks import ModelCheckpoint as ModelCheckpoint
from xtrain.callbacks import ProgressBar as ProgressBar
from xtrain.compat.imports import install as _install_import_paths
from xtrain.contract import Backend as Backend
from xtrain.contract import Capabilities as Capabilities
from xtrain.data.datamodule import LightningDataModule as LightningDataModule
from xtrain.errors import BackendContractError as BackendContractError
from xtrain.errors import BackendUnavailableError as BackendUnavailableError
from xtrain.errors import CheckpointError as CheckpointError
from xtrain.errors import ConfigurationError as ConfigurationError
from xtrain.errors import LaunchError as LaunchError
from xtrain.errors import MissingDependencyError as MissingDependencyError
from xtrain.errors import NonFiniteLossError as NonFiniteLossError
from xtrain.errors import ProtocolError as ProtocolError
from xtrain.errors import RankFailedError as RankFailedError
from xtrain.errors import UnknownBackendError as UnknownBackendError
from xtrain.errors import UnsupportedCombinationError as UnsupportedCombinationError
from xtrain.errors import XTrainError as XTrainError
from xtrain.launch.join import rank_zero_only as rank_zero_only
from xtrain.module import LightningModule as LightningModule
from xtrain.optimizer import LightningOptimizer as LightningOptimizer
from xtrain.registry import register_backend as register_backend
from xtrain.seed import seed_everything as seed_everything
from xtrain.trainer import Trainer as Trainer

__version__ = "0.1.0"
__all__ = [
    "Backend",
    "BackendContractError",
    "BackendUnavailableError",
    "Callback",
    "Capabilities",
    "CheckpointError",
    "ConfigurationError",
    "LaunchError",
    "LightningDataModule",
    "LightningModule",
    "LightningOptimizer",
    "MissingDependencyError",
    "ModelCheckpoint",
    "NonFiniteLossError",
    "ProgressBar",
    "ProtocolError",
    "RankFailedError",
    "Trainer",
    "UnknownBackendError",
    "UnsupportedCombinationError",
    "XTrainError",
    "rank_zero_only",
    "register_backend",
    "seed_everything",
]

_install_import_paths()
