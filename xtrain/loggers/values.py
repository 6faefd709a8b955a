"""What loggers are given, made into what their files and services take: hyperparameters, images, names."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtrain.errors import ConfigurationError, explain
from xtrain.loggers.base import as_text

if TYPE_CHECKING:
    import numpy as np


def with_prefix(metrics: Mapping[str, float], prefix: str) -> Mapping[str, float]:
    """Return `metrics` with ``prefix-`` before every name, as Lightning writes it."""
    return {f"{prefix}-{name}": value for name, value in metrics.items()} if prefix else metrics


def as_dict(params: Any) -> dict[str, Any]:
    """Return hyperparameters as nested dicts.

    Args:
        params: a mapping, an `argparse.Namespace`, a dataclass, any object with attributes, or None; such
            values inside, too.

    Raises:
        ConfigurationError: for anything else.
    """
    found = _items(params)
    if found is None:
        fix = "logger.log_hyperparams({'lr': 1e-3})"
        raise ConfigurationError(explain("hyperparameters by name", f"{params!r:.80}", fix))
    return {str(name): _nested(value) for name, value in found.items()}


def _items(value: Any) -> Mapping[Any, Any] | None:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        return value
    if isinstance(value, Namespace):
        return vars(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    plain = isinstance(value, type | Tensor | str | bytes | int | float | list | tuple | set) or callable(value)
    return None if plain else getattr(value, "__dict__", None)


def _nested(value: Any) -> Any:
    known = isinstance(value, Mapping | Namespace) or (is_dataclass(value) and not isinstance(value, type))
    return as_dict(value) if known else value


def plain(params: Any) -> dict[str, Any]:
    """Return hyperparameters as JSON can hold them; objects are named, and infinite numbers are text."""
    return {name: _plain(value) for name, value in as_dict(params).items()}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return as_text(value)


def flat(params: Any) -> dict[str, bool | int | float | str]:
    """Return hyperparameters without nesting: ``{"optimizer/lr": 0.1}``; what is no plain value is text."""
    return dict(_flat("", as_dict(params)))


def _flat(above: str, params: Mapping[str, Any]) -> Iterator[tuple[str, bool | int | float | str]]:
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(f"{above}{name}/", value)
        else:
            yield f"{above}{name}", value if isinstance(value, bool | int | float | str) else as_text(value)


def as_pixels(image: Any) -> np.ndarray[Any, Any]:
    """Return an image as an array of bytes, shape (height, width, 1, 3 or 4 channels).

    Args:
        image: a matplotlib figure; a PIL image; an array of shape (height, width) or (height, width, channels);
            or a tensor of shape (height, width) or (channels, height, width). Floats are 0 (black) to 1.

    Raises:
        ConfigurationError: for anything else.
    """
    import numpy as np

    if hasattr(image, "canvas") and hasattr(image, "savefig"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas: Any = FigureCanvasAgg(image)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba()).copy()
    if isinstance(image, Tensor):
        pixels = image.detach().cpu()
        pixels = pixels.float() if pixels.dtype in (torch.bfloat16, torch.float16) else pixels
        array = (pixels.permute(1, 2, 0) if pixels.dim() == 3 else pixels).numpy()
    else:
        array = np.asarray(image)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype.kind not in "fuib":
        received = f"{type(image).__name__} of shape {tuple(getattr(image, 'shape', ()))}"
        fix = "self.log_image('sample', images[0])  # (channels, height, width)"
        raise ConfigurationError(explain("one image with 1, 3 or 4 channels, or a figure", received, fix))
    if array.dtype.kind == "f":
        array = np.rint(array.clip(0, 1) * 255)
    return array.astype(np.uint8)
