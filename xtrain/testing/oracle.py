"""Hand-written training loops: what each experiment means, in plain PyTorch.

Nothing of xtrain is imported. A loop is written the way its author would without any framework, on
the full batch and on one device; `Plain` only takes the precision out of the reader's way. The loops
of loss scaling proper are in `oracle_scaling`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from xtrain.testing.networks import Batch, adam, d_loss, g_loss, networks, regression, sgd

Notes = dict[str, list[Any]]
Clip = Callable[[list[nn.Parameter]], Tensor]

SCALE = 2.0**10
"""Loss scale of the hand-written fp16 loops: a power of two, so scaling itself never rounds."""


class Plain(nn.Module):
    """A hand-written loop's surroundings: two networks, the data, autocast, counters.

    Args:
        precision: one of the names of `xtrain.precision.PRECISIONS`.
        data: one epoch of global batches.
        epochs: how often the data is repeated.
        device: where the loop runs.
        max_steps: stop after so many training steps in which an optimizer moved; -1 is never.
    """

    def __init__(
        self, precision: str, data: list[Batch], epochs: int = 1, device: str = "cpu", max_steps: int = -1
    ) -> None:
        super().__init__()
        self.autocast_dtype = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision)
        self.dtype = {"16-true": torch.float16, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
        self.scale = SCALE if precision == "16-mixed" else 1.0
        self.device = device
        self.G, self.D = networks()
        self.to(device, self.dtype)
        self.data = [(x.to(device, self.dtype), z.to(device, self.dtype)) for x, z in data]
        self.epochs, self.max_steps = epochs, max_steps
        self.notes: Notes = {}
        self.step_count: list[int] = []
        self.global_step = 0

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the context of one forward pass.

        Without autocast's weight cache, in which a network used twice would sum the gradients of both
        uses in half precision.
        """
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device, self.autocast_dtype, cache_enabled=False)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Add the true gradients of `loss` to those held, however the precision gets at them."""
        if self.scale == 1.0:
            loss.backward(**kwargs)
            return
        held = [(p, p.grad) for p in self.parameters()]
        self.zero_grad()
        (loss * self.scale).backward(**kwargs)
        for parameter, before in held:
            new = None if parameter.grad is None else parameter.grad / self.scale
            parameter.grad = before if new is None else new if before is None else before + new

    def owns(self, *optimizers: Optimizer) -> None:
        """Count the steps of `optimizers` with torch's own hook."""
        self.step_count = [0] * len(optimizers)

        def counter(index: int) -> Callable[..., None]:
            def count(*_: object) -> None:
                self.step_count[index] += 1

            return count

        for index, optimizer in enumerate(optimizers):
            optimizer.register_step_post_hook(counter(index))

    def steps(self) -> Iterator[tuple[int, int, Batch]]:
        """Yield epoch, index and batch; a step in which any optimizer moved counts for `global_step`."""
        for epoch in range(self.epochs):
            for index, batch in enumerate(self.data):
                before = sum(self.step_count)
                yield epoch, index, batch
                self.global_step += sum(self.step_count) > before
                if self.global_step == self.max_steps:
                    return

    def note(self, **values: Any) -> None:
        """Append to the lists that are compared with what the xtrain module noted."""
        for name, value in values.items():
            self.notes.setdefault(name, []).append(value)


def gan_optimizers(run: Plain) -> tuple[Optimizer, Optimizer]:
    """Return the pair nearly every experiment uses: SGD for G, Adam for D."""
    pair = sgd(run.G.parameters()), adam(run.D.parameters())
    run.owns(*pair)
    return pair


def one_optimizer(run: Plain) -> Optimizer:
    """Return SGD over D, for the experiments with a single optimizer."""
    optimizer = sgd(run.D.parameters())
    run.owns(optimizer)
    return optimizer


def forward_regression(run: Plain, batch: Batch) -> Tensor:
    """Return the supervised loss, computed in the run's precision."""
    with run.forward_context():
        return regression(run.D, *batch)


def gan(run: Plain, clip: Clip | None = None) -> None:
    """The GAN of the specification; the generator's loss also leaves gradients in D."""
    g_opt, d_opt = gan_optimizers(run)
    for _, _, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d = d_loss(run.D, x, fake)
        d_opt.zero_grad()
        run.backward(err_d)
        if clip is not None:
            run.note(d_norm=clip(list(run.D.parameters())))
        d_opt.step()
        with run.forward_context():
            err_g = g_loss(run.D, fake)
        g_opt.zero_grad()
        run.backward(err_g)
        if clip is not None:
            run.note(g_norm=clip(list(run.G.parameters())))
        g_opt.step()


def total_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients together, 0-dim."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return nn.utils.get_total_norm(gradients)


def by_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Clip to norm 0.2, which is below the true norms, and return the norm before."""
    return clip_grad_norm_(parameters, 0.2)


def by_value(parameters: list[nn.Parameter]) -> Tensor:
    """Clip single values to 0.03 and return the norm before."""
    norm = total_norm(parameters)
    clip_grad_value_(parameters, 0.03)
    return norm


def measure(parameters: list[nn.Parameter]) -> Tensor:
    """Return the norm and change nothing."""
    return total_norm(parameters)


def accumulate(run: Plain, every: int = 2) -> None:
    """One optimizer that steps after every N batches."""
    opt = one_optimizer(run)
    for _, index, batch in run.steps():
        run.backward(forward_regression(run, batch) / every)
        if (index + 1) % every == 0:
            opt.step()
            opt.zero_grad()


def accumulate_apart(run: Plain) -> None:
    """G steps every second batch, D every third; what G's loss leaves in D counts, as in plain PyTorch."""
    g_opt, d_opt = gan_optimizers(run)
    for _, index, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d, err_g = d_loss(run.D, x, fake) / 3, g_loss(run.D, fake) / 2
        run.backward(err_d)
        run.backward(err_g)
        if (index + 1) % 3 == 0:
            run.note(d_norm=by_norm(list(run.D.parameters())))
            d_opt.step()
            d_opt.zero_grad()
        if (index + 1) % 2 == 0:
            g_opt.step()
            g_opt.zero_grad()


def frequencies(run: Plain) -> None:
    """The discriminator steps every other batch, the generator every batch."""
    g_opt, d_opt = gan_optimizers(run)
    for _, index, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d = d_loss(run.D, x, fake)
        d_opt.zero_grad()
        run.backward(err_d)
        if (index + 1) % 2 == 0:
            d_opt.step()
        with run.forward_context():
            err_g = g_loss(run.D, fake)
        g_opt.zero_grad()
        run.backward(err_g)
        g_opt.step()


def toggled(run: Plain) -> None:
    """D accumulates two batches, shielded from G's loss; one bias of G is frozen by the user."""
    run.G.first.bias.requires_grad_(False)
    g_opt, d_opt = gan_optimizers(run)
    own_g = [p for p in run.G.parameters() if p.requires_grad]
    for _, index, (x, z) in run.steps():
        for p in own_g:
            p.requires_grad_(False)
        with run.forward_context():
            err_d = d_loss(run.D, x, run.G(z)) / 2
        run.backward(err_d)
        run.note(in_d_phase=[False, False, True])
        if (index + 1) % 2 == 0:
            d_opt.step()
            d_opt.zero_grad()
        for p in own_g:
            p.requires_grad_(True)
        run.D.requires_grad_(False)
        with run.forward_context():
            err_g = g_loss(run.D, run.G(z))
        g_opt.zero_grad()
        run.backward(err_g)
        run.note(in_g_phase=[False, True, False])
        g_opt.step()
        run.D.requires_grad_(True)
        run.note(after=[False, True, True])


def n_critic(run: Plain) -> None:
    """Three clipped steps of D, then one of G, inside every training step."""
    g_opt, d_opt = gan_optimizers(run)
    for _, _, (x, z) in run.steps():
        for k in (1, 2, 3):
            with run.forward_context():
                err_d = d_loss(run.D, x * k, run.G(z))
            d_opt.zero_grad()
            run.backward(err_d)
            run.note(norm=by_norm(list(run.D.parameters())))
            d_opt.step()
        with run.forward_context():
            err_g = g_loss(run.D, run.G(z))
        g_opt.zero_grad()
        run.backward(err_g)
        g_opt.step()


def shared_loss(run: Plain) -> None:
    """One backward feeds both optimizers; only D is clipped."""
    g_opt, d_opt = gan_optimizers(run)
    for _, _, (_, z) in run.steps():
        with run.forward_context():
            loss = regression(run.D, run.G(z), z)
        g_opt.zero_grad()
        d_opt.zero_grad()
        run.backward(loss)
        run.note(norm=by_norm(list(run.D.parameters())))
        d_opt.step()
        g_opt.step()


def closure(run: Plain, make: Callable[..., Optimizer]) -> None:
    """A step that evaluates the loss itself, as often as the optimizer likes."""
    opt: Any = make(run.D.parameters())
    run.owns(opt)
    for _, _, batch in run.steps():

        def evaluate(batch: Batch = batch) -> Tensor:
            loss = forward_regression(run, batch)
            opt.zero_grad()
            run.backward(loss)
            return loss

        run.note(loss=opt.step(evaluate))


def lbfgs(parameters: Any) -> torch.optim.LBFGS:
    """Return an LBFGS that evaluates its closure several times a step."""
    return torch.optim.LBFGS(parameters, lr=0.3, max_iter=3, history_size=3)


def schedule_every_step(run: Plain) -> None:
    """Two schedulers, each stepped every batch."""
    pair = gan_optimizers(run)
    schedulers = [ExponentialLR(pair[0], 0.8), StepLR(pair[1], 2, 0.5)]
    for _, _, (_, z) in run.steps():
        with run.forward_context():
            loss = regression(run.D, run.G(z), z)
        for opt in pair:
            opt.zero_grad()
        run.backward(loss)
        for opt, scheduler in zip(pair, schedulers, strict=True):
            opt.step()
            scheduler.step()
        run.note(lr=[opt.param_groups[0]["lr"] for opt in pair])


def schedule_sometimes(run: Plain, steps: int = 3, epochs: int = 2) -> None:
    """One scheduler, stepped every N batches and again at the end of every N epochs."""
    opt = one_optimizer(run)
    scheduler = ExponentialLR(opt, 0.7)
    for epoch, index, batch in run.steps():
        opt.zero_grad()
        run.backward(forward_regression(run, batch))
        opt.step()
        if (index + 1) % steps == 0:
            scheduler.step()
        if index + 1 == len(run.data) and (epoch + 1) % epochs == 0:
            scheduler.step()
        run.note(lr=opt.param_groups[0]["lr"], place=[epoch, index, index + 1 == len(run.data)])


def plateau(run: Plain) -> None:
    """ReduceLROnPlateau on the epoch's mean loss."""
    opt = one_optimizer(run)
    scheduler = ReduceLROnPlateau(opt, factor=0.5, patience=0, threshold=0.3)
    losses: list[Tensor] = []
    for _, index, batch in run.steps():
        loss = forward_regression(run, batch)
        opt.zero_grad()
        run.backward(loss)
        opt.step()
        losses.append(loss.detach().float())
        if index + 1 == len(run.data):
            mean = torch.stack(losses).mean()
            scheduler.step(float(mean))
            run.note(mean=mean, lr=opt.param_groups[0]["lr"])
            losses.clear()
