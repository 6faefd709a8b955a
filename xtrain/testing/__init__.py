"""The conformance suite: every backend, also a third party's, inherits it.

A backend's test file is::

    from xtrain.testing import BackendConformance

    class TestMyChip(BackendConformance):
        backend = "mychip"
        precisions = ("32-true", "bf16-mixed")

A project's own tests use `rehearse`, which needs neither::

    from xtrain.testing import rehearse

    def test_gan_will_train_elsewhere():
        rehearse("model.py:GAN", data="model.py:loader", targets=["16-mixed"])

The suite needs pytest and hypothesis: ``pip install 'xtrain-torch[testing]'``. The experiments and their
plain-PyTorch loops (`xtrain.testing.experiments`) need neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xtrain.testing.rehearsing import rehearse as rehearse

if TYPE_CHECKING:
    from xtrain.testing.suite import BackendConformance as BackendConformance

__all__ = ["BackendConformance", "rehearse"]


def __getattr__(name: str) -> Any:
    """Import the suite, and with it pytest and hypothesis, when it is asked for.

    Raises:
        MissingDependencyError: if pytest or hypothesis is not installed.
    """
    if name != "BackendConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from xtrain.testing.suite import BackendConformance
    except ModuleNotFoundError as error:
        from xtrain.errors import MissingDependencyError, explain

        text = explain("pytest and hypothesis to be installed", str(error), "pip install 'xtrain-torch[testing]'")
        raise MissingDependencyError(text) from error
    return BackendConformance
