"""A rehearsal as a test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xtrain.rehearsal.findings import Report


def rehearse(
    module: Any,
    loader: Any = None,
    *,
    data: str = "",
    batch: str = "",
    init: Sequence[str] = (),
    strict: bool = False,
    devices: int | None = None,
    **settings: Any,
) -> Report:
    """Rehearse a module, and fail with the report if something will go wrong.

    Args:
        module: ``"model.py:GAN"``, or a module.
        loader: of a module; anything that `Trainer.fit` takes.
        data: ``"model.py:loader"``, for a path, as ``--data``.
        batch: shapes of random batches, as ``--batch``.
        init: arguments of the class, as ``--init``: ``["lr=1e-3"]``.
        strict: fail for warnings, too.
        devices: of the machine that it is meant for.
        **settings: `targets`, `steps`, `memory`, `ignore` and `checks`, see `Trainer.check`.

    Returns:
        The report.

    Raises:
        AssertionError: if there are errors (or warnings); the message is the screen of ``xtrain check``.
        RehearsalError: if the module cannot be made.

    Example:
        >>> from xtrain.testing import rehearse
        >>> rehearse(module, data, checks=["protocol"]).status
        0
    """
    from xtrain.rehearsal import Settings
    from xtrain.rehearsal import rehearse as run
    from xtrain.rehearsal.subject import Source
    from xtrain.rehearsal.verbs import check_in_memory
    from xtrain.trainer import Trainer

    named: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()}
    given = Settings(devices=devices, **named)
    if isinstance(module, str):
        report = run(Source(module, data, batch, tuple(init)), given)
    else:
        report = check_in_memory(module, loader, given, Trainer("cpu", enable_progress_bar=False))
    bad = {"error", "warning"} if strict else {"error"}
    if report.failed or any(finding.severity in bad for finding in report.findings):
        raise AssertionError(f"\n{report}")
    return report
