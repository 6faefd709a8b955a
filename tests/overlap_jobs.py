"""What the tests of early averages run: steps that change gradients after backward, or on one rank only."""

from functools import partial

import torch
from torch import nn

from xtrain import LightningModule
from xtrain.testing.experiments import make_trainer
from xtrain.testing.experiments.gan import Gan
from xtrain.testing.networks import batches

BATCHES = 6
LAYER = {"bucket_mb": 100 / 2**20}
"""A bucket of at least 100 bytes: each layer below fills one of its own."""


class _Fails(torch.autograd.Function):
    """Is the identity, but raises in backward: the layers behind it have their gradients by then."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("on purpose")


class Layers(LightningModule):
    """Three layers, one optimizer; `odd_step` does something to the fourth batch."""

    start = 3

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.clip = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def loss(self, batch, used=(0, 1, 2), fails=False):
        x = torch.cat(batch, 1)[:, :6]
        for index in used:
            x = torch.tanh(self.layers[index](x))
            x = _Fails.apply(x) if fails and index == 1 else x
        return (x - 1).square().mean()

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        if batch_idx == self.start:
            self.odd_step(opt, batch)
        else:
            self.plain_step(opt, batch)
        opt.step()

    def plain_step(self, opt, batch):
        opt.zero_grad()
        self.manual_backward(self.loss(batch))

    odd_step = plain_step


class Touched(Layers):
    """One rank changes the gradients of one layer."""

    def odd_step(self, opt, batch):
        self.plain_step(opt, batch)
        if self.global_rank == 1:
            self.layers[1].weight.grad.mul_(3)


class Replaced(Layers):
    """One rank puts another tensor in the place of a gradient."""

    def odd_step(self, opt, batch):
        self.plain_step(opt, batch)
        if self.global_rank == 1:
            self.layers[1].weight.grad = self.layers[1].weight.grad * 3


class Removed(Layers):
    """One rank drops a gradient: it counts as zero."""

    def odd_step(self, opt, batch):
        self.plain_step(opt, batch)
        if self.global_rank == 1:
            self.layers[1].weight.grad = None


class Unused(Layers):
    """The ranks use different layers, and none the second one."""

    def odd_step(self, opt, batch):
        opt.zero_grad()
        self.manual_backward(self.loss(batch, (0,) if self.global_rank else (2,)))


class Twice(Layers):
    """One rank adds a second backward."""

    def odd_step(self, opt, batch):
        self.plain_step(opt, batch)
        if self.global_rank == 1:
            self.manual_backward(self.loss(batch))


class Zeroed(Layers):
    """One rank drops its gradients and starts again."""

    def odd_step(self, opt, batch):
        self.plain_step(opt, batch)
        if self.global_rank == 1:
            opt.zero_grad(set_to_none=False)
            self.manual_backward(self.loss(batch))


class Raises(Layers):
    """Backward fails halfway on one rank, which goes on with what has arrived."""

    def odd_step(self, opt, batch):
        opt.zero_grad()
        try:
            self.manual_backward(self.loss(batch, fails=self.global_rank == 1))
        except ArithmeticError:
            self.manual_backward(self.loss(batch) * 0.5)


class Skips(Layers):
    """Gradients of two batches are added; one rank leaves out the first batch of the third pair."""

    start = -1

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        if batch_idx % 2 == 0:
            opt.zero_grad()
        if not (batch_idx == 4 and self.global_rank == 1):
            self.manual_backward(self.loss(batch))
        if batch_idx % 2 == 1:
            opt.step()


class Unfinished(Layers):
    """One rank has started an average when the run ends, the other never came there."""

    start = BATCHES - 1

    def training_step(self, batch, batch_idx):
        if batch_idx < self.start:
            super().training_step(batch, batch_idx)
        elif self.global_rank == 1:
            self.plain_step(self.optimizers(), batch)


class Hooked(Layers):
    """A hook of the user changes each gradient of one layer when it has arrived, later than everybody else's."""

    def on_fit_start(self):
        def double(parameter):
            parameter.grad.mul_(2)

        for parameter in self.layers[1].parameters():
            parameter.register_post_accumulate_grad_hook(double)


class Sparse(Layers):
    """An embedding whose gradient is sparse, on one rank or on both."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.embedding, self.both = nn.Embedding(6, 6), both

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_fit_start(self):
        self.embedding.sparse = self.both or self.global_rank == 1

    def loss(self, batch):
        rows = torch.arange(len(batch[0])) % 3 + self.global_rank
        return super().loss(batch) + self.embedding(rows).square().mean()


CASES = {
    "plain": Layers,
    "touched": Touched,
    "replaced": Replaced,
    "removed": Removed,
    "unused": Unused,
    "twice": Twice,
    "zeroed": Zeroed,
    "raises": Raises,
    "skips": Skips,
    "unfinished": Unfinished,
    "hooked": Hooked,
    "sparse": partial(Sparse, both=True),
    "sparse on one rank": partial(Sparse, both=False),
}


def trained(make, options, precision, world_size, rank):
    torch.manual_seed(5)
    module = make()
    trainer = make_trainer("cpu", precision, options, max_epochs=1)
    trainer.fit(module, batches(BATCHES, world_size, rank))
    return [p.detach().clone() for p in module.parameters()], trainer.backend.reductions


def with_and_without(case, precision, world_size, rank):
    """Train with early averages and without; return whether all bits agree, and the counts."""
    make = CASES[case]
    early, counts = trained(make, {"overlap": True, **LAYER}, precision, world_size, rank)
    late, none = trained(make, {}, precision, world_size, rank)
    assert none is None
    return all(map(torch.equal, early, late)), (counts.early, counts.thrown, counts.late), early


def gan(bucket_mb, world_size, rank):
    """Train the GAN of the documentation, whose generator's loss reaches the discriminator's parameters."""
    return trained(Gan, {"overlap": True, "bucket_mb": bucket_mb}, "32-true", world_size, rank)[1]
