"""What the processes of `test_stages` are sent: small runs, each telling one or two facts as plain values."""

import copy
import os
from pathlib import Path

import torch
from torch import nn

import xtrain
from xtrain.testing.experiments import as_loader, make_trainer, outcome_of
from xtrain.testing.experiments.backward import GradientPenalty
from xtrain.testing.experiments.clipping import ClippedGan
from xtrain.testing.experiments.gan import Gan
from xtrain.testing.networks import batches, networks, regression, sgd
from xtrain.testing.probes import perform_plan
from xtrain.testing.recorder import OneOptimizer, Recorder

PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
CLAMP = 0.3


def import_deepspeed():
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401

    import xtrain.testing.suite  # noqa: F401


def fit(module, options, world_size, rank, precision="32-true", count=4, **trainer):
    run = make_trainer("deepspeed", precision, options, max_epochs=1, **trainer)
    run.fit(module, batches(count, world_size, rank))
    return run


def whole(backend, module):
    with backend.full_parameters(module):
        return [p.detach().clone() for p in module.parameters()]


class Writes(OneOptimizer):
    """Clamps the weights after each step, in one of the ways users write it, as WGAN does."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(batch))
        opt.step()
        backend = self.trainer.backend
        with backend.full_parameters(self.D), torch.no_grad():
            for p in self.D.parameters():
                if self.way == "clamp_":
                    p.clamp_(-CLAMP, CLAMP)
                elif self.way == "data.clamp_":
                    p.data.clamp_(-CLAMP, CLAMP)
                else:
                    p.data = p.data.clamp(-CLAMP, CLAMP)


def clamped_by_hand(count=4):
    d = networks()[1]
    opt = sgd(d.parameters())
    for batch in batches(count):
        opt.zero_grad()
        regression(d, *batch).backward()
        opt.step()
        for p in d.parameters():
            p.data.clamp_(-CLAMP, CLAMP)
    return [p.detach() for p in d.parameters()]


def write(way, options, precision, world_size, rank):
    module = Writes(way)
    fit(module, options, world_size, rank, precision)
    return [p.detach().float() for p in module.D.parameters()]


class Looks(ClippedGan):
    """Notes how much of its parameters it sees, in training and in validation."""

    def __init__(self):
        super().__init__(0.2)
        self.root = nn.Parameter(torch.ones(5))

    def configure_optimizers(self):
        g_opt, d_opt = super().configure_optimizers()
        g_opt.add_param_group({"params": [self.root]})
        return g_opt, d_opt

    def forward(self, batch):
        return self.G(batch[1])

    def sizes(self):
        with torch._C.DisableTorchFunction():  # of what is really there, whatever a user is told
            return [p.numel() for p in self.G.parameters()]

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.note(training=self.sizes(), root=self.root.numel())

    def validation_step(self, batch, batch_idx):
        self.note(validated=float(self.D(self.G(batch[1])).mean()))

    def on_validation_epoch_end(self):
        with self.trainer.backend.full_parameters(self.G):
            self.note(validation=self.sizes(), image=self.G(torch.ones(1, 3)).flatten().tolist())


def looks(options, world_size, rank):
    module = Looks()
    run = make_trainer("deepspeed", "32-true", options, max_epochs=1)
    data = batches(2, world_size, rank)
    run.fit(module, data, as_loader(data))
    after = {"attributes": [name for m in module.modules() for name in vars(m) if "ds_" in name]}
    after["parameters"] = [list(vars(p)) for p in module.parameters()]
    after["hooks"] = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    after["sizes"], after["image"] = module.sizes(), module.G(torch.ones(1, 3)).flatten().tolist()
    after["predicted"] = len(run.predict(copy.deepcopy(module), as_loader(data)))
    run.max_epochs = 2  # train on, with new engines
    run.fit(module, data)
    return module.notes, after


class WholePenalty(GradientPenalty):
    """A gradient penalty on a discriminator that is kept whole for it."""

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        with self.trainer.backend.full_parameters(self.D):
            x = batch[0].clone().requires_grad_()
            (slope,) = torch.autograd.grad(self.D(x).sum(), x, create_graph=True)
            opt.zero_grad()
            self.manual_backward((slope.norm(dim=1) - 1.0).square().mean())
        opt.step()


def same_program(plan, options, world_size, rank):
    """Run `plan` on the full batch on every rank: its losses are no means over samples."""
    return perform_plan(plan, "deepspeed", "32-true", options)


class Apart(Gan):
    """Starts from other weights on every rank."""

    def __init__(self, rank):
        super().__init__()
        with torch.no_grad():
            for p in self.parameters():
                p.add_(rank)


def apart(options, world_size, rank):
    module = Apart(rank)
    return outcome_of(module, fit(module, options, world_size, rank))


class Poisoned(OneOptimizer):
    """One NaN gradient, in the second batch, clipped; on one rank only if there are several."""

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        bad = batch_idx == 1 and self.trainer.global_rank == 0
        self.manual_backward(self.loss(batch) * (float("nan") if bad else 1.0))
        self.clip(opt)
        self.note(applied=bool(opt.step()))


def poisoned(options, world_size, rank):
    module = Poisoned()
    fit(module, options, world_size, rank, nonfinite_loss="ignore")
    return module.notes["applied"], all(bool(p.isfinite().all()) for p in module.D.parameters())


class Raises(Gan):
    """Fails in its second step on all ranks."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        if batch_idx:
            raise KeyError("on purpose")


def raises(options, world_size, rank):
    fit(Raises(), options, world_size, rank)


def devices(count, world_size, rank):
    xtrain.Trainer(backend="deepspeed", devices=count, max_epochs=1, enable_progress_bar=False).fit(Gan(), batches(1))


class Misowned(Recorder):
    """Changes what its optimizer holds while it trains.

    Args:
        change: ``"foreign"`` (a tensor that is not the module's), ``"unfreeze"``, ``"group"`` or ``"replace"``.
    """

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.image = [torch.zeros(3, requires_grad=True)]
        if change == "unfreeze":
            self.D.first.bias.requires_grad_(False)

    def configure_optimizers(self):
        return sgd(self.image if self.change == "foreign" else self.D.parameters())

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        if self.change == "unfreeze":
            self.D.first.bias.requires_grad_(True)
        elif self.change == "group":
            opt.add_param_group({"params": list(self.G.parameters())})
        elif self.change == "replace":
            opt.optimizer = sgd(self.D.parameters())
        self.manual_backward(regression(self.D, *batch))
        opt.step()


class Lookup(Recorder):
    """Looks rows up in a table with sparse gradients; its optimizer has a group without parameters."""

    def __init__(self):
        super().__init__()
        self.table = table()

    def configure_optimizers(self):
        opt = torch.optim.SGD(self.table.parameters(), lr=0.1)
        opt.add_param_group({"params": []})
        return opt

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(lookup_loss(self.table, batch))
        opt.step()


def table():
    return nn.Embedding.from_pretrained(torch.arange(12.0).view(6, 2), freeze=False, sparse=True)


def lookup_loss(rows, batch):
    return rows((batch[1][:, 0] > 0).long()).square().mean()


def lookup(options, world_size, rank):
    module = Lookup()
    fit(module, options, world_size, rank)
    return module.table.weight.detach()


def lookup_by_hand(count=4):
    rows = table()
    opt = torch.optim.SGD(rows.parameters(), lr=0.1)
    for batch in batches(count):
        opt.zero_grad()
        lookup_loss(rows, batch).backward()
        opt.step()
    return rows.weight.detach()


def misfit(options, world_size, rank):
    fit(Gan(), options, world_size, rank)


class Sometimes(OneOptimizer):
    """The first layer is reached by every second batch, and then only on rank 0."""

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(sometimes_loss(self.D, batch, batch_idx, self.trainer.global_rank))
        opt.step()


def sometimes_loss(d, batch, index, rank):
    if index % 2 and rank == 0:
        return regression(d, *batch)
    return d.last(torch.ones(1, 6)).square().mean()


def sometimes(options, world_size, rank):
    module = Sometimes()
    fit(module, options, world_size, rank)
    return [p.detach() for p in module.D.parameters()]


def sometimes_by_hand(count=4):
    d = networks()[1]
    opt = sgd(d.parameters())
    for index in range(count):
        opt.zero_grad(set_to_none=False)
        sum(sometimes_loss(d, batches(count, 2, r)[index], index, r) for r in (0, 1)).div(2).backward()
        for p in d.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        opt.step()
    return [p.detach() for p in d.parameters()]


class Plain(OneOptimizer):
    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(batch))
        opt.step()


def without_compiler(options):
    """Train where nothing can be compiled; tell how far from plain PyTorch it ended, and what was built."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    module = Plain()
    fit(module, options, 1, 0)
    d = networks()[1]
    opt = sgd(d.parameters())
    for batch in batches(4):
        opt.zero_grad()
        regression(d, *batch).backward()
        opt.step()
    pairs = zip(module.D.parameters(), d.parameters(), strict=True)
    built = [str(path) for path in Path(os.environ["TORCH_EXTENSIONS_DIR"]).iterdir()]
    return max(float((a - b).abs().max()) for a, b in pairs), built


class Regression(xtrain.LightningModule):
    """Manual optimization of a network that was given."""

    def __init__(self, net):
        super().__init__()
        self.automatic_optimization = False
        self.net = net

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.05)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        opt.step()
