"""``Module.load_from_checkpoint``: a module with the weights and hyperparameters of a checkpoint, without a Trainer."""

from __future__ import annotations

import inspect
import os
from typing import Any, TypeVar

from xtrain.errors import ConfigurationError, explain
from xtrain.hparams import with_attributes

T = TypeVar("T", bound="LoadsFromCheckpoint")


class LoadsFromCheckpoint:
    """A `torch.nn.Module` that can be made from a checkpoint."""

    @classmethod
    def load_from_checkpoint(
        cls: type[T],
        checkpoint_path: str | os.PathLike[str],
        map_location: Any = None,
        strict: bool = True,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> T:
        """Return a module with the saved weights, made with the saved hyperparameters.

        Args:
            checkpoint_path: a checkpoint of xtrain, or a file of Lightning 2; also a URL of fsspec.
            map_location: the device to move the module to; default: the CPU.
            strict: whether all weights must be there, and no others.
            weights_only: False lets a file of Lightning run code; never for a file of others.
            **kwargs: arguments of ``__init__``, in place of the saved ones.

        Raises:
            CheckpointError: for a damaged checkpoint, or weights that do not fit.
            ConfigurationError: if ``__init__`` needs an argument that was not saved.

        Example:
            >>> trainer.fit(module, data)
            >>> trainer.save_checkpoint("model.ckpt")
            >>> torch.equal(type(module).load_from_checkpoint("model.ckpt").net.weight, module.net.weight)
            True
        """
        from xtrain.checkpoint.finding import open_checkpoint, read_checkpoint
        from xtrain.checkpoint.weights import load_weights, with_masters

        checkpoint = read_checkpoint(open_checkpoint(checkpoint_path), weights_only).checkpoint
        saved = dict(checkpoint.get("hyper_parameters", {}))
        try:
            module: Any = cls(**{**_arguments(cls, saved, kwargs), **kwargs})
        except TypeError as error:
            fix = f"self.save_hyperparameters() in __init__, or {cls.__name__}.load_from_checkpoint(path, hidden=64)"
            raise ConfigurationError(explain("all arguments of __init__ in the checkpoint", str(error), fix)) from error
        module.on_load_checkpoint(checkpoint)
        weights = with_masters(module, checkpoint)
        remedy = f"{cls.__name__}.load_from_checkpoint(path, strict=False), which loads what fits"
        load_weights(module, weights, strict, remedy)
        return module if map_location is None else module.to(map_location)  # type: ignore[no-any-return]


def _arguments(cls: Any, saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``__init__`` that were saved; one that was saved alone, as a configuration, is whole."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return saved
    missing = [p.name for p in parameters if p.name in named - saved.keys() - given.keys() and p.default is p.empty]
    if saved and len(missing) == 1 and not named & saved.keys():
        return {missing[0]: with_attributes(saved)}
    return {name: value for name, value in saved.items() if name in named}
