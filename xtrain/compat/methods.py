"""Methods of Lightning's module that have little to do with training; those that are not here say what is."""

from __future__ import annotations

from typing import Any, NoReturn, cast

from torch import nn

from xtrain.errors import ConfigurationError, explain


class LightningMethods:
    """What a `LightningModule`, which derives from this, has beside its steps and verbs.

    Attributes:
        example_input_array: an input for tools that want one; nothing here reads it.
    """

    example_input_array: Any = None

    def configure_callbacks(self) -> Any:
        """Return callbacks that belong to the module; they replace those of the same class given to the Trainer.

        Example:
            >>> from xtrain.callbacks import EarlyStopping
            >>> class Stopping(LightningModule):
            ...     def configure_callbacks(self):
            ...         return [EarlyStopping("val_loss")]
        """
        return []

    def freeze(self) -> None:
        """Let no parameter require gradients, and put the layers in eval mode.

        Example:
            >>> self.freeze()
            >>> any(parameter.requires_grad for parameter in self.parameters())
            False
            >>> self.unfreeze()
        """
        module = _as_module(self)
        for parameter in module.parameters():
            parameter.requires_grad = False
        module.eval()

    def unfreeze(self) -> None:
        """Let every parameter require gradients, and put the layers in train mode.

        Example:
            >>> self.unfreeze()
            >>> all(parameter.requires_grad for parameter in self.parameters())
            True
        """
        module = _as_module(self)
        for parameter in module.parameters():
            parameter.requires_grad = True
        module.train()

    def to_onnx(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say what exports to ONNX.

        Raises:
            ConfigurationError: always.

        Example:
            >>> self.to_onnx("model")
            Traceback (most recent call last):
            ...
            xtrain.errors.ConfigurationError: Expected a method of xtrain's LightningModule...
        """
        raise _not_here("to_onnx", "torch.onnx.export(module.eval(), (example,), 'model.onnx')")

    def to_torchscript(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say what makes a program that runs without Python.

        Raises:
            ConfigurationError: always.

        Example:
            >>> self.to_torchscript("model")
            Traceback (most recent call last):
            ...
            xtrain.errors.ConfigurationError: Expected a method of xtrain's LightningModule...
        """
        raise _not_here("to_torchscript", "torch.export.export(module.eval(), (example,))")

    def to_tensorrt(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say what compiles for TensorRT.

        Raises:
            ConfigurationError: always.

        Example:
            >>> self.to_tensorrt("model")
            Traceback (most recent call last):
            ...
            xtrain.errors.ConfigurationError: Expected a method of xtrain's LightningModule...
        """
        raise _not_here("to_tensorrt", "torch_tensorrt.compile(module.eval(), inputs=[example])")


def _as_module(methods: LightningMethods) -> nn.Module:
    return cast("nn.Module", methods)


def _not_here(name: str, instead: str) -> ConfigurationError:
    return ConfigurationError(explain("a method of xtrain's LightningModule", f"{name}(), which it lacks", instead))
