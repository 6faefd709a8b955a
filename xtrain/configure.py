"""Reads what a user's ``configure_optimizers`` returned, in any of Lightning's documented forms."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from xtrain.errors import ConfigurationError, explain
from xtrain.optimizer import LightningOptimizer

ACCEPTED_FORMS = (
    "an optimizer; a list or tuple of optimizers; (list of optimizers, list of schedulers); "
    "a dict with 'optimizer' and optionally 'lr_scheduler'; a list or tuple of such dicts; "
    "a dict of names to optimizers or such dicts; or None"
)
_EXAMPLE = "return [g_opt, d_opt], [g_scheduler]"


@dataclass
class LRSchedulerConfig:
    """A learning-rate scheduler and when automatic optimization steps it.

    In manual optimization the user steps it and every other field is ignored.

    Attributes:
        scheduler: the torch scheduler.
        interval: ``"epoch"`` or ``"step"``, the unit of `frequency`.
        frequency: step the scheduler every so many intervals.
        monitor: name in ``trainer.callback_metrics``, needed by `ReduceLROnPlateau`.
        strict: raise (rather than warn) when `monitor` is missing.
        name: a label for loggers.
        reduce_on_plateau: whether ``step`` takes the monitored value.
    """

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    name: str | None = None
    reduce_on_plateau: bool = False


def read_optimizers(returned: Any) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    """Return the optimizers and scheduler settings in `returned`.

    Raises:
        ConfigurationError: naming the item that is not understood, its type and what is accepted;
            also for a scheduler of an optimizer that was not returned, and for a parameter that one
            optimizer holds twice.
    """
    optimizers, schedulers = _split(_unwrapped(returned))
    for index, optimizer in enumerate(optimizers):
        _check_unique_parameters(index, optimizer)
        if any(optimizer is other for other in optimizers[:index]):
            received = f"one {type(optimizer).__name__} twice, the second time at position {index}"
            raise ConfigurationError(explain("each optimizer once from configure_optimizers", received, _EXAMPLE))
    for config in schedulers:
        owner = getattr(config.scheduler, "optimizer", None)
        if not any(owner is o for o in optimizers):
            raise ConfigurationError(
                explain(
                    "every scheduler to drive an optimizer that configure_optimizers returns",
                    f"a {type(config.scheduler).__name__} of a {type(owner).__name__} that is not returned",
                    "return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 10)]",
                )
            )
    return optimizers, schedulers


def ask_for_optimizers(configure: Callable[[], Any]) -> Any:
    """Return what ``configure_optimizers`` returns.

    Raises:
        ConfigurationError: if it makes an optimizer without parameters.
    """
    try:
        return configure()
    except ValueError as error:
        if "empty parameter list" not in str(error):
            raise
        expected = "parameters for every optimizer that configure_optimizers makes"
        fix = "torch.optim.Adam(self.net.parameters(), lr=1e-3), self.net made in __init__ or configure_model"
        raise ConfigurationError(explain(expected, f"none ({error})", fix)) from error


def names_of(returned: Any) -> list[str] | None:
    """Return the names that a dict from ``configure_optimizers`` gives to its optimizers, None for any other form."""
    return list(returned) if _is_named(returned) else None


def _is_named(returned: Any) -> bool:
    known = {"optimizer", "lr_scheduler", "monitor", "frequency"}
    return isinstance(returned, dict) and bool(returned) and not known & returned.keys()


class NamedOptimizers(list[LightningOptimizer]):
    """The optimizers of a run in order; those of a dict answer by name, too: ``self.optimizers()["generator"]``."""

    def __getitem__(self, key: Any) -> Any:
        """Return the optimizer at a position, or of a name.

        Raises:
            ConfigurationError: for a name that none of them has.
        """
        if not isinstance(key, str):
            return super().__getitem__(key)
        for optimizer in self:
            if optimizer.name == key:
                return optimizer
        names = [optimizer.name for optimizer in self]
        closest = (difflib.get_close_matches(key, [n for n in names if n], 1) or names)[0]
        raise ConfigurationError(explain(f"an optimizer out of {names}", repr(key), f"self.optimizers()[{closest!r}]"))


def fuse(optimizers: Sequence[Optimizer]) -> None:
    """Let each of `optimizers` that torch can fuse update all its parameters in one call.

    Groups whose user chose ``fused``, ``foreach`` or ``differentiable`` are left as they are.
    """
    for optimizer in optimizers:
        for settings in (optimizer.defaults, *optimizer.param_groups):
            chosen = settings.get("foreach") or settings.get("differentiable")
            if settings.get("fused", False) is None and not chosen:
                settings["fused"] = True


def check_monitors(schedulers: Sequence[LRSchedulerConfig]) -> None:
    """Check that automatic optimization knows the metric of every `ReduceLROnPlateau`.

    Raises:
        ConfigurationError: if one has no ``monitor``.
    """
    for config in schedulers:
        if config.reduce_on_plateau and config.monitor is None:
            raise ConfigurationError(
                explain(
                    "a 'monitor' for ReduceLROnPlateau in automatic optimization",
                    "none",
                    "{'optimizer': opt, 'lr_scheduler': {'scheduler': plateau, 'monitor': 'val_loss'}}",
                )
            )


def _unwrapped(returned: Any) -> Any:
    """Return raw optimizers in the place of wrapped ones, which Lightning accepts too."""
    if isinstance(returned, LightningOptimizer):
        return returned.optimizer
    if _is_named(returned):
        return {name: _unwrapped(item) for name, item in returned.items()}
    if isinstance(returned, list | tuple):
        return [_unwrapped(item) for item in returned]
    if isinstance(returned, dict) and isinstance(returned.get("optimizer"), LightningOptimizer):
        return {**returned, "optimizer": returned["optimizer"].optimizer}
    return returned


def _split(returned: Any) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    if returned is None:
        return [], []
    if _is_named(returned):
        return _read_items(list(returned.values()), [f"[{name!r}]" for name in returned])
    if isinstance(returned, Optimizer | dict):
        returned = [returned]
    if not isinstance(returned, list | tuple):
        raise _nonsense("the returned value", returned)
    if len(returned) == 2 and all(isinstance(part, list | tuple) for part in returned):
        optimizers, schedulers = returned
        for index, item in enumerate(optimizers):
            if not isinstance(item, Optimizer):
                raise _nonsense(f"item {index} of the list of optimizers", item)
        configs = [_scheduler(item, f"item {i} of the list of schedulers") for i, item in enumerate(schedulers)]
        return list(optimizers), configs
    return _read_items(returned)


def _read_items(
    items: Sequence[Any], places: Sequence[str] | None = None
) -> tuple[list[Optimizer], list[LRSchedulerConfig]]:
    optimizers: list[Optimizer] = []
    schedulers: list[LRSchedulerConfig] = []
    for index, item in enumerate(items):
        where = f"item {index}" if places is None else f"the dict's {places[index]}"
        if isinstance(item, Optimizer):
            optimizers.append(item)
            continue
        if not isinstance(item, dict):
            raise _nonsense(where, item)
        unknown = sorted(set(item) - {"optimizer", "lr_scheduler", "monitor", "frequency"})
        if unknown:
            raise _nonsense(f"{where}, keys {unknown},", item)
        if not isinstance(item.get("optimizer"), Optimizer):
            raise _nonsense(f"{where}['optimizer']", item.get("optimizer"))
        if item.get("frequency") not in (None, 1):
            fix = "if batch_idx % 2 == 0: opt.step(), or 'lr_scheduler': {'scheduler': scheduler, 'frequency': 2}"
            received = f"'frequency': {item['frequency']!r}, which would be ignored"
            raise ConfigurationError(explain(f"a training step that decides when {where} steps", received, fix))
        optimizers.append(item["optimizer"])
        if item.get("lr_scheduler") is not None:
            schedulers.append(_scheduler(item["lr_scheduler"], f"{where}['lr_scheduler']", item.get("monitor")))
    return optimizers, schedulers


def _scheduler(item: Any, where: str, monitor: str | None = None) -> LRSchedulerConfig:
    settings = dict(item) if isinstance(item, dict) else {"scheduler": item}
    known = [field.name for field in fields(LRSchedulerConfig)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        fix = "{'scheduler': scheduler, 'interval': 'epoch', 'frequency': 1}"
        raise ConfigurationError(
            explain(f"scheduler keys out of {', '.join(known)} in {where}", ", ".join(unknown), fix)
        )
    scheduler = settings.get("scheduler")
    if not (isinstance(scheduler, LRScheduler) or (hasattr(scheduler, "step") and hasattr(scheduler, "optimizer"))):
        raise _nonsense(f"{where}, the scheduler,", scheduler)
    settings.setdefault("reduce_on_plateau", isinstance(scheduler, ReduceLROnPlateau))
    settings.setdefault("monitor", monitor)
    config = LRSchedulerConfig(**settings)
    if config.interval not in ("epoch", "step"):
        raise ConfigurationError(
            explain(f"'epoch' or 'step' as the interval of {where}", repr(config.interval), "'interval': 'step'")
        )
    if not (isinstance(config.frequency, int) and config.frequency >= 1):
        raise ConfigurationError(
            explain(f"a frequency of at least 1 in {where}", repr(config.frequency), "'frequency': 1")
        )
    return config


def _nonsense(where: str, received: Any) -> ConfigurationError:
    return ConfigurationError(
        explain(
            f"configure_optimizers to return {ACCEPTED_FORMS}",
            f"{where} is {type(received).__name__}: {received!r:.80}",
            _EXAMPLE,
        )
    )


def _check_unique_parameters(index: int, optimizer: Optimizer) -> None:
    seen: set[int] = set()
    for group_index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) in seen:
                raise ConfigurationError(
                    explain(
                        f"each parameter once in optimizer {index} ({type(optimizer).__name__})",
                        f"parameter {position} of group {group_index}, shape {tuple(parameter.shape)}, a second time",
                        "torch.optim.Adam(dict.fromkeys([*a.parameters(), *b.parameters()]))",
                    )
                )
            seen.add(id(parameter))
