"""Which backend and precision a Trainer gets: what the script says, else the launcher, else the hardware.

Where the script and the launcher disagree, neither is overridden: that is an error that names both.
"""

from __future__ import annotations

import warnings

from xtrain.compat.backends import AUTO, FALLBACK, HARDWARE
from xtrain.contract import Backend
from xtrain.errors import ConfigurationError, explain
from xtrain.launch.environment import Launch
from xtrain.launch.join import current_launch
from xtrain.precision import Precision, resolve_precision
from xtrain.registry import get_backend_class, registered_backends, third_party_backends

_warned: set[str] = set()


def resolve(
    chosen: str | Backend, precision: str | int | None, devices: int | None
) -> tuple[str | Backend, Precision, str]:
    """Return backend and precision of a Trainer with these arguments in this process, and where they come from.

    Raises:
        ConfigurationError: if one of them contradicts the launcher.
    """
    launch = current_launch()
    _pass_on_warnings(launch)
    return (
        resolve_backend(chosen, launch),
        agreed_precision(precision, launch),
        describe(chosen, precision, devices, launch),
    )


def resolve_backend(chosen: str | Backend, launch: Launch) -> str | Backend:
    """Return the backend: `chosen`, or what ``"auto"`` stands for under `launch`.

    Raises:
        ConfigurationError: if `chosen` contradicts the launcher.
    """
    if chosen == AUTO:
        return _resolve(launch)[0]
    name, places = chosen if isinstance(chosen, str) else chosen.name, registered_backends()
    wanted = launch.backend
    if wanted is None or name == wanted or places.get(name, name) == places.get(wanted, wanted):
        return chosen
    received = f"backend={name!r}, but {launch.sources['backend']} asks for {wanted!r}"
    fix = f"Trainer(backend={wanted!r}) or Trainer(backend='auto'), or another launch command"
    raise ConfigurationError(explain("script and launcher to agree on the backend", received, fix))


def agreed_precision(precision: str | int | None, launch: Launch) -> Precision:
    """Return the policy for `precision`; None takes the launcher's, else ``"32-true"``.

    Raises:
        ConfigurationError: for an unknown precision, or one that contradicts the launcher.
    """
    policy = resolve_precision(launch.precision if precision is None else precision)
    if launch.precision in (None, policy.name):
        return policy
    received = f"precision={policy.name!r}, but {launch.sources['precision']} asks for {launch.precision!r}"
    fix = f"Trainer(precision={launch.precision!r}), or leave precision out"
    raise ConfigurationError(explain("script and launcher to agree on the precision", received, fix))


def describe(backend: str | Backend, precision: str | int | None, devices: int | None, launch: Launch) -> str:
    """Return what was chosen and where it comes from, for the line at the start of a run.

    Args:
        backend: as given to the Trainer.
        precision: as given to the Trainer.
        devices: as given to the Trainer.
        launch: what the launcher said.
    """
    name = backend if isinstance(backend, str) else backend.name
    chosen, why = _resolve(launch) if name == AUTO else (name, "given")
    said = "given" if precision is not None else launch.sources.get("precision", "default")
    counted = f"{launch.launcher}, {launch.sources['world_size']}" if launch.joined else "no launcher"
    processes = launch.world_size if launch.joined or devices is None else devices
    return (
        f"xtrain: backend={chosen} ({why}); precision={agreed_precision(precision, launch).name} ({said}); "
        f"processes={processes} ({'given' if processes == devices and not launch.joined else counted})"
    )


def _pass_on_warnings(launch: Launch) -> None:
    """Say once, on rank 0, what is suspicious about the launch."""
    for text in launch.warnings if launch.rank == 0 else ():
        if text not in _warned:
            _warned.add(text)
            warnings.warn(text, UserWarning, stacklevel=4)


def _resolve(launch: Launch) -> tuple[str, str]:
    """Return the name that ``"auto"`` stands for, and where it comes from."""
    if launch.backend is not None:
        return launch.backend, launch.sources["backend"]
    wished = [cls for cls in third_party_backends() if cls.in_auto]
    missing = {cls.name: cls.available() for cls in [*wished, *map(get_backend_class, HARDWARE)]}
    for name, reason in missing.items():
        if reason is None:
            return name, "found on this machine"
    return FALLBACK, "; ".join(f"no {name}: {reason}" for name, reason in missing.items())
