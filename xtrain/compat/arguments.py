"""Arguments of Lightning's Trainer that xtrain's does not have: taken where they would change nothing."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtrain.errors import ConfigurationError
from xtrain.run.options import OptionArguments


@dataclass(frozen=True)
class Argument:
    """One argument of Lightning.

    Attributes:
        harmless: the values that change nothing; `ANY` is every value.
        instead: what xtrain has for the others.
    """

    harmless: tuple[Any, ...]
    instead: str


ANY: Any = object()

ARGUMENTS: dict[str, Argument] = {
    "enable_autolog_hparams": Argument((None, True), "self.save_hyperparameters(logger=False)"),
    "model_registry": Argument((None,), "a path of a file"),
    "plugins": Argument((None, (), []), "precision=..., backend_options={...}; launchers are found by themselves"),
}


def check_arguments(given: Mapping[str, Any], trainer: type) -> None:
    """Accept what would change nothing.

    Args:
        given: the keyword arguments that are no parameters of `trainer`.
        trainer: the class they were given to.

    Raises:
        ConfigurationError: lists all the others, each with what xtrain has instead.
    """
    refused = [_refused(name, value, trainer) for name, value in given.items()]
    lines = [line for line in refused if line is not None]
    if lines:
        several = "arguments" if len(lines) > 1 else "an argument"
        head = f"Expected arguments of xtrain's Trainer. Received: {several} that it does not have."
        raise ConfigurationError("\n".join([head, *(f"Fix:  {line}" for line in lines)]))


def _refused(name: str, value: Any, trainer: type) -> str | None:
    argument = ARGUMENTS.get(name)
    if argument is None:
        close = difflib.get_close_matches(
            name, [*inspect.signature(trainer).parameters, *OptionArguments.__annotations__, *ARGUMENTS], 1
        )
        meant = f"; did you mean {close[0]}?" if close else ""
        return f"leave {name}={value!r:.60} out{meant}"
    if ANY in argument.harmless or any(value is each or value == each for each in argument.harmless):
        return None
    return f"{name}={value!r:.60}: {argument.instead}"


def read_devices(devices: Any) -> Any:
    """Return ``devices`` of a Trainer as a number, None for what the launcher says.

    Lightning's ``"2"``, ``[0, 1]`` and ``"0,1"`` are understood where they mean the first devices.

    Raises:
        ConfigurationError: for other devices than the first ones.
    """
    if devices in (None, "auto"):
        return None
    if devices in (-1, "-1"):
        fix = "Trainer(devices=torch.accelerator.device_count())"
        raise ConfigurationError(f"Expected a number of devices. Received: devices={devices!r}.\nFix:  {fix}")
    if isinstance(devices, str) and devices.strip().isdecimal():
        return int(devices)
    text = devices.strip(" ,") if isinstance(devices, str) else ""
    chosen = [int(part) for part in text.split(",")] if text.replace(",", "").replace(" ", "").isdecimal() else devices
    if not isinstance(chosen, Sequence) or isinstance(chosen, str):
        return devices
    if list(chosen) == list(range(len(chosen))) and chosen:
        return len(chosen)
    places = ",".join(map(str, chosen)) or "0"
    fix = f"CUDA_VISIBLE_DEVICES={places} python train.py, with Trainer(devices={max(len(chosen), 1)})"
    raise ConfigurationError(f"Expected a number of devices. Received: devices={devices!r}.\nFix:  {fix}")
