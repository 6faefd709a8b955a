"""More experiments as LightningModules: the counterparts of `oracle_more`."""

# ruff: noqa: D102 - hooks are documented where `xtrain.hooks` declares them
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from xtrain.testing.modules import Accumulate, OneOptimizer, Recorder
from xtrain.testing.networks import HIDDEN, Batch, adam, d_loss, g_loss, regression, sgd


class KeepZeros(Recorder):
    """``zero_grad(set_to_none=False)`` leaves zeros, into which the next backward adds."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        for opt in (g_opt, d_opt):
            opt.zero_grad(set_to_none=False)
        fake = self.G(z)
        self.manual_backward(d_loss(self.D, x, fake) + g_loss(self.D, fake))
        g_opt.step()
        d_opt.step()
        d_opt.zero_grad(set_to_none=False)
        self.note(left=[p.grad.abs().sum() for p in self.D.parameters() if p.grad is not None])


class KeepGradients(OneOptimizer):
    """Gradients that are not zeroed after a step still count in the next one."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        if batch_idx % 3 == 0:
            opt.zero_grad()
        self.manual_backward(self.loss(batch) / 3)
        self.note(norm=self.clip(opt))
        opt.step()


class RetainGraph(OneOptimizer):
    """Two backwards through one graph."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        loss = self.loss(batch) / 2
        opt.zero_grad()
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        opt.step()


class GradientArgument(OneOptimizer):
    """The loss is weighted by the gradient given to its backward, by position."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        loss = self.loss(batch)
        opt.zero_grad()
        self.manual_backward(loss, torch.full_like(loss, 0.5))
        opt.step()


class InputsArgument(Recorder):
    """``inputs=`` keeps G's loss away from the gradients that D accumulates."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        g_opt, d_opt = self.optimizers()
        x, z = batch
        fake = self.G(z)
        err_d, err_g = d_loss(self.D, x, fake) / 2, g_loss(self.D, fake)
        self.manual_backward(err_d)
        g_opt.zero_grad()
        self.manual_backward(err_g, inputs=list(self.G.parameters()))
        g_opt.step()
        if (batch_idx + 1) % 2 == 0:
            d_opt.step()
            d_opt.zero_grad()


class SumOfLosses(OneOptimizer):
    """A backward per loss, one step for both."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        x, z = batch
        opt.zero_grad()
        for k in (1, 2):
            self.manual_backward(regression(self.D, x * k, z) / 2)
        self.note(norm=self.clip(opt))
        opt.step()


class GradientPenalty(OneOptimizer):
    """A loss that holds a gradient of its own: differentiated twice, as in WGAN-GP."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        x = batch[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.D(x).sum(), x, create_graph=True)
        opt.zero_grad()
        self.manual_backward((slope.norm(dim=1) - 1.0).square().mean())
        opt.step()


class NoGradFirst(OneOptimizer):
    """A forward without gradients comes before the one that trains: autocast must not remember its weights."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        x, z = batch
        with torch.no_grad():
            target = self.D(x).detach()
        opt.zero_grad()
        self.manual_backward(regression(self.D, x + target, z))
        opt.step()


class Tied(OneOptimizer):
    """One weight matrix in two modules, as in an autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = nn.Linear(4, HIDDEN, bias=False)
        self.transposed.weight = self.D.first.weight
        self.bias = nn.Parameter(torch.zeros(4))

    def configure_optimizers(self) -> Any:
        return sgd([*self.D.parameters(), self.bias])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        x, z = batch
        hidden = torch.tanh(self.D.first(x))
        rebuilt = nn.functional.linear(hidden, self.transposed.weight.t(), self.bias)
        opt.zero_grad()
        self.manual_backward(nn.functional.mse_loss(rebuilt, x) + regression(self.D, x, z))
        self.note(norm=self.clip(opt), tied=self.transposed.weight is self.D.first.weight)
        opt.step()
        self.note(bias=self.bias.detach().clone())


class SharedLayer(Recorder):
    """D's first layer belongs to both optimizers."""

    def configure_optimizers(self) -> Any:
        return sgd([*self.G.parameters(), *self.D.first.parameters()]), adam(self.D.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, z = batch
        for opt, on_d in zip(self.optimizers(), (False, True), strict=True):
            fake = self.G(z)
            loss = d_loss(self.D, x, fake) if on_d else g_loss(self.D, fake)
            opt.zero_grad()
            self.manual_backward(loss)
            opt.step()


class Temperature(Recorder):
    """A learned scalar without dimensions, under an optimizer of its own, as in soft actor-critic."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def configure_optimizers(self) -> Any:
        return sgd(self.D.parameters()), sgd([self.temperature])

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        pair = self.optimizers()
        x, z = batch
        loss = nn.functional.mse_loss(self.D(x).squeeze(1) * self.temperature, z.sum(1))
        for opt in pair:
            opt.zero_grad()
        self.manual_backward(loss)
        for opt in pair:
            self.note(norm=self.clip(opt))
            opt.step()
        self.note(temperature=self.temperature.detach().clone())


class Unowned(Recorder):
    """G's first bias is frozen though an optimizer holds it; D's last layer trains in no optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.G.first.bias.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return sgd(self.G.parameters()), adam(self.D.first.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        pair = self.optimizers()
        _, z = batch
        loss = regression(self.D, self.G(z), z)
        for opt in pair:
            opt.zero_grad()
        self.manual_backward(loss)
        self.note(norm=self.clip(pair[0]))
        for opt in pair:
            opt.step()


class ParameterGroups(OneOptimizer):
    """Two groups with their own learning rates; the norm is that of both together."""

    def configure_optimizers(self) -> Any:
        return adam(
            [{"params": list(self.D.first.parameters())}, {"params": list(self.D.last.parameters()), "lr": 0.005}]
        )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(batch))
        self.note(norm=self.clip(opt), lr=[group["lr"] for group in opt.param_groups])
        opt.step()


class Automatic(OneOptimizer):
    """Automatic optimization: the step returns its loss, the Trainer does the rest.

    Args:
        interval: when the Trainer steps the scheduler, ``"epoch"`` or ``"step"`` (then every second one).
    """

    def __init__(self, interval: str = "epoch") -> None:
        super().__init__()
        self.automatic_optimization = True
        self.interval = interval

    def configure_optimizers(self) -> Any:
        opt = super().configure_optimizers()
        frequency = 2 if self.interval == "step" else 1
        config = {"scheduler": ExponentialLR(opt, 0.7), "interval": self.interval, "frequency": frequency}
        return {"optimizer": opt, "lr_scheduler": config}

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.note(lr=self.optimizers().param_groups[0]["lr"])
        return {"loss": self.loss(batch)}


class WithValidation(Accumulate):
    """Gradients accumulated over two batches survive a validation after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.G.eval()

    def modes(self) -> list[bool]:
        """Return who is training, and whether gradients are recorded."""
        return [self.training, self.G.training, self.D.training, torch.is_grad_enabled()]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.note(modes=self.modes())
        super().training_step(batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.note(validation_modes=self.modes())
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.note(validation_loss=self.trainer.callback_metrics["val_loss"])


class Evaluated(OneOptimizer):
    """Validation, test and prediction without training."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        outputs: Tensor = self.D(batch[0])
        return outputs
