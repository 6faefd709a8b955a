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

    def freeze(self) -> None:
        """Let no parameter require gradients, and put the layers in eval mode."""
        module = _as_module(self)
        for parameter in module.parameters():
            parameter.requires_grad = False
        module.eval()

    def unfreeze(self) -> None:
        """Let every parameter require gradients, and put the layers in train mode."""
        module = _as_module(self)
        for parameter in module.parameters():
            parameter.requires_grad = True
        module.train()

    def to_onnx(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say what exports to ONNX."""
        raise _not_here("to_onnx", "torch.onnx.export(module.eval(), (example,), 'model.onnx')")

    def to_torchscript(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say what makes a program that runs without Python."""
        raise _not_here("to_torchscript", "torch.export.export(module.eval(), (example,))")

    def to_tensorrt(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say what compiles for TensorRT."""
        raise _not_here("to_tensorrt", "torch_tensorrt.compile(module.eval(), inputs=[example])")


def _as_module(methods: LightningMethods) -> nn.Module:
    return cast("nn.Module", methods)


def _not_here(name: str, instead: str) -> ConfigurationError:
    return ConfigurationError(explain("a method of xtrain's LightningModule", f"{name}(), which it lacks", instead))
