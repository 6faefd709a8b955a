"""What the tests of several processes run on every rank: each job returns plain values, for the test to judge."""

import random
import time
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from xtrain_backends.eager.averaging import agree, average, state_of
from xtrain_backends.eager.process_group import TorchCollectives

from xtrain import LightningModule, ProtocolError, Trainer, rank_zero_only, seed_everything
from xtrain.testing.experiments import make_trainer
from xtrain.testing.experiments.gan import Gan
from xtrain.testing.misuse import MISUSES
from xtrain.testing.networks import batches


def joined(world_size, rank):
    """Join the processes, as the first fit of a script does; return whether there is a first process only."""
    trainer = make_trainer("cpu", "32-true", {}, max_epochs=1)
    trainer.fit(Gan(), batches(1, world_size, rank))
    return rank_zero_only(lambda: trainer.global_rank)(), trainer.world_size


def sent_late(world_size, rank):
    """Send a tensor between two ranks by torch's own verbs, later than xtrain waits in one piece."""
    joined(world_size, rank)
    tensor = torch.full((2,), float(rank))
    if rank:
        time.sleep(1.2)
        dist.send(tensor, 0)
    else:
        dist.recv(tensor, 1)
    dist.all_reduce(tensor)  # the connection still stands
    return tensor.tolist()


class EndsLate:
    """A collective that ends in the moment after a wait for it ended in vain; then it went well, or not."""

    def __init__(self, error=None):
        self.over, self.error = False, error

    def wait(self, timeout):
        if not self.over:
            self.over = True
            raise RuntimeError("timed out")
        if self.error:
            raise self.error
        return True

    def is_completed(self):
        return self.over


def misused(name, world_size, rank):
    """Train the module of a misuse of the suite; return what it is refused with."""
    misuse = next(m for m in MISUSES if m.name == name)
    try:
        make_trainer("cpu", "32-true", {}, max_epochs=1).fit(misuse.module(), batches(1, world_size, rank))
    except ProtocolError as error:
        return str(error)
    return None


def average_gradients(parameters, call, rank):
    ranks = TorchCollectives(torch.device("cpu"), rank)
    average(parameters, agree([state_of(p) for p in parameters], call, ranks), ranks.world_size)


def averaged(case, world_size, rank):
    """Average gradients that some ranks lack, in several dtypes, sparse ones, large ones."""
    joined(world_size, rank)
    own = float(rank + 1)
    parameters = [nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float64)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, own)
    if case == "missing on one rank" and rank == 0:
        parameters[0].grad = None
    if case == "missing everywhere":
        parameters[1].grad = None
    if case == "large":
        parameters[0] = nn.Parameter(torch.zeros(300, 400))
        parameters[0].grad = torch.full((300, 400), own)
    if case == "strided":
        parameters[0] = nn.Parameter(torch.zeros(400, 300))
        parameters[0].grad = torch.full((300, 400), own).T
    if case.startswith("sparse"):
        parameters[0] = nn.Parameter(torch.zeros(4, 2))
        rows = torch.tensor([[rank, 3]])
        if case == "sparse" or rank == 0:
            parameters[0].grad = torch.sparse_coo_tensor(rows, torch.full((2, 2), own), (4, 2), check_invariants=True)
        elif case == "sparse beside dense":
            parameters[0].grad = torch.full((4, 2), own)
    average_gradients(parameters, "average", rank)
    return [None if p.grad is None else p.grad.to_dense().double().contiguous() for p in parameters]


def different_optimizers(world_size, rank):
    joined(world_size, rank)
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    average_gradients([parameter], f"average optimizer {rank}", rank)


class Odd(Gan):
    """Differs on rank 1, in one respect."""

    def __init__(self, what: str, rank: int) -> None:
        super().__init__()
        odd = rank == 1
        self.odd = what if odd else ""
        self.norm = nn.BatchNorm1d(3)
        if self.odd == "shape":
            self.G.last = nn.Linear(6, 5)
        if self.odd == "count":
            self.extra = nn.Parameter(torch.zeros(1))
        if self.odd == "frozen":
            self.D.last.bias.requires_grad_(False)
        if self.odd == "value":
            nn.init.ones_(self.D.last.bias)
        if self.odd == "buffer":
            self.norm.running_mean.fill_(3.0)

    def configure_optimizers(self):
        g_opt, d_opt = super().configure_optimizers()
        if self.odd == "class":
            d_opt = torch.optim.SGD(self.D.parameters(), lr=0.1)
        if self.odd == "order":
            d_opt = torch.optim.Adam(list(self.D.parameters())[::-1])
        if self.odd == "fewer":
            return g_opt
        return g_opt, d_opt


def odd(what, options, world_size, rank, backend="cpu"):
    torch.manual_seed(3)
    module = Odd(what, rank)
    make_trainer(backend, "32-true", options, max_epochs=1).fit(module, batches(1, world_size, rank))
    return module.D.last.bias.detach().clone(), module.norm.running_mean.clone()


class Overflowing(Gan):
    """The loss of G is infinite in the second batch, on rank 1 alone."""

    def training_step(self, batch, batch_idx):
        g_opt, d_opt = self.optimizers()
        x, z = batch
        for opt, loss in ((g_opt, self.G(z).sum()), (d_opt, self.D(x).sum())):
            opt.zero_grad()
            broken = opt is g_opt and batch_idx == 1 and self.global_rank == 1
            self.manual_backward(loss * (float("inf") if broken else 1.0))
            opt.step()


def overflow(world_size, rank):
    module = Overflowing()
    trainer = make_trainer("cpu", "16-mixed", {}, max_epochs=1, nonfinite_loss="ignore")
    trainer.fit(module, batches(4, world_size, rank))
    return [[o.step_count, o.skipped_steps] for o in trainer.run.life.optimizers], trainer.backend.scaler.current_scale


class RawStepAfterFailedClosure(Gan):
    """A closure raises inside the step; the torch optimizer is stepped after that."""

    def training_step(self, batch, batch_idx):
        opt, _ = self.optimizers()

        def closure():
            opt.zero_grad()
            self.manual_backward(self.G(batch[1]).sum())
            raise KeyError("on purpose")

        try:
            opt.step(closure)
        except KeyError:
            self.raised = True
        self.manual_backward(self.G(batch[1]).sum())
        opt.optimizer.step()


def raw_step_after_failed_closure(world_size, rank):
    module = RawStepAfterFailedClosure()
    make_trainer("cpu", "32-true", {}, max_epochs=1).fit(module, batches(1, world_size, rank))


def reduced(world_size, rank):
    """Reduce whole numbers, whose mean is none."""
    joined(world_size, rank)
    backend = Trainer("cpu").backend
    backend.launch()
    numbers = torch.tensor([rank, 1])
    return [backend.collectives.all_reduce(numbers, op).tolist() for op in ("sum", "mean", "max", "min")]


class Draws(Gan):
    """Draws a number from each generator in the training step."""

    def training_step(self, batch, batch_idx):
        self.drawn = torch.rand(()).item(), random.random()


def drawn(world_size, rank, backend="cpu"):
    """Return what two runs drew, and what was drawn after them."""
    seed_everything(3)
    module, runs = Draws(), []
    for _ in range(2):
        make_trainer(backend, "32-true", {}, max_epochs=1).fit(module, batches(1, world_size, rank))
        runs.append(module.drawn)
    return runs, torch.rand(()).item()


class Stream:
    """Batches of which nobody knows how many there are."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(torch.arange(self.count))


class Reads(Gan):
    """Notes the batches of each epoch, and which was called the last."""

    def on_fit_start(self):
        self.seen = []

    def on_train_epoch_start(self):
        self.seen.append([])

    def training_step(self, batch, batch_idx):
        self.seen[-1].append((batch.tolist(), self.trainer.is_last_batch))


def uneven(counts, how, world_size, rank):
    """Read streams of unequal length for two epochs."""
    module = Reads()
    make_trainer("cpu", "32-true", {}, max_epochs=2, uneven_batches=how).fit(module, Stream(counts[rank]))
    return module.seen


class Items(IterableDataset):
    def __iter__(self):
        return iter(range(11))


def stream(world_size, rank):
    """Read a DataLoader without a length; return the numbers of each batch."""
    module = Reads()
    make_trainer("cpu", "32-true", {}, max_epochs=1).fit(module, DataLoader(Items(), batch_size=2))
    return [batch for batch, _ in module.seen[0]]


def orders(kind, world_size, rank):
    """Read a shuffled loader for two epochs; return the numbers of each batch."""
    seed_everything(5)
    torch.manual_seed(rank)  # the order must not come from the ranks' own generators
    numbers = range(22)
    loader = DataLoader(numbers, batch_size=4, shuffle=True)
    if kind == "distributed already":
        loader = DataLoader(numbers, batch_size=4, sampler=DistributedSampler(numbers, world_size, rank, seed=9))
    module = Reads()
    make_trainer("cpu", "32-true", {}, max_epochs=2).fit(module, loader)
    return [[batch for batch, _ in epoch] for epoch in module.seen]


class LineSearch(LightningModule):
    """LBFGS, whose line search compares losses: on one rank's own they would lead elsewhere than on the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0]))

    def loss(self, batch):
        return torch.cosh(3 * (batch - self.weight)).log().sum(1).mean() + self.weight.square().sum()

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=1.0, max_iter=3, line_search_fn="strong_wolfe")


ROWS = torch.tensor([[9.0, 4.0], [-5.0, 0.5], [0.3, -2.0], [0.1, 7.0]])


def line_search(world_size, rank):
    module = LineSearch()
    make_trainer("cpu", "32-true", {}, max_epochs=1).fit(module, [ROWS[rank::world_size]] * 2)
    return module.weight.detach().clone()


class Prepares(Gan):
    """Writes a file, slowly, and looks for it."""

    def __init__(self, path):
        super().__init__()
        self.path = Path(path)

    def prepare_data(self):
        time.sleep(2)
        self.path.touch()

    def setup(self, stage):
        self.found = self.path.exists()


def prepared(path, world_size, rank):
    module = Prepares(path)
    make_trainer("cpu", "32-true", {}, max_epochs=1).fit(module, batches(1, world_size, rank))
    return module.found
