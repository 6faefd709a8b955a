"""What single ranks do in the tests of the fsdp backend; every function can be sent to `xtrain.testing.ranks.Ranks`."""

import copy

import torch
from recipes import WIDTH, Average, Frozen, Muon, Recipe, Uneven, Verbs, batches, mlp, quiet, sgd
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss

from xtrain import LightningModule, ProtocolError


def fit_twice(world_size, rank):
    """Fit, validate, copy, and fit the same module again; return its parameters and what kind they are."""
    module = Twofold()
    for _ in range(2):
        trainer = quiet("fsdp", {})
        trainer.fit(module, batches(2, rank, world_size))
        trainer.validate(module, Wrapped(batches(1, rank, world_size)))
        copy.deepcopy(module.a)
    kinds = {type(p).__name__ for p in module.parameters()} | {type(m).__name__ for m in module.modules()}
    same = [id(p) for p in module.parameters()] == module.ids
    held = {type(p).__name__ for opt in trainer.optimizers for group in opt.param_groups for p in group["params"]}
    return {k: v.clone() for k, v in module.state_dict().items()}, kinds | held, same


class Wrapped(list):
    pass


class Twofold(Frozen):
    def __init__(self):
        super().__init__()
        self.ids = [id(p) for p in self.parameters()]

    def validation_step(self, batch, batch_idx):
        self.log("loss", mse_loss(self.a(batch[0]), batch[1]))


class Counted(Recipe):
    """Notes what is sent and what is kept: the numbers are formulas, not measurements."""

    def train_on(self, do, opts, noise, data, index):
        for opt in opts:
            opt.zero_grad()
        for part in noise.chunk(4):
            do.accumulate(self.b(self.a(part)).square().mean() / 4)
        for opt in opts:
            do.clip(opt, 1.0)
            opt.step()


def count_reductions(make, options, world_size, rank):
    """Return how many reductions into shards four training steps of four backwards each make."""
    module = make()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        quiet("fsdp", options).fit(module, batches(module.steps, rank, world_size))
    return sum(event.name == "c10d::_reduce_scatter_base_" for event in profile.events())


class MuonAndAdamW(LightningModule):
    """One loss by automatic optimization: a matrix by Muon, the bias of the same layer by AdamW, one clip for both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = mlp(5, WIDTH)

    def configure_optimizers(self):
        matrices = [p for p in self.net.parameters() if p.dim() == 2]
        rest = [p for p in self.net.parameters() if p.dim() != 2]
        return torch.optim.Muon(matrices, lr=0.05), torch.optim.AdamW(rest, lr=0.05, eps=1e-3)

    def training_step(self, batch, batch_idx):
        noise, data = batch
        return 50 * mse_loss(self.net(noise), data)


def share_one_loss(options, flags, world_size, rank):
    """Return the parameters after automatic optimization by two optimizers in one layer."""
    module = MuonAndAdamW()
    quiet("fsdp", options, gradient_clip_val=0.5, **flags).fit(module, batches(4, rank, world_size))
    return {name: value.clone() for name, value in module.state_dict().items()}


def share_one_loss_by_hand(accumulate):
    """Return the parameters of the plain loop on whole batches."""
    module = MuonAndAdamW()
    opts = module.configure_optimizers()
    for index, batch in enumerate(batches(4)):
        (module.training_step(batch, index) / accumulate).backward()
        if (index + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            for opt in opts:
                opt.step()
                opt.zero_grad()
    return module.state_dict()


def start_apart(world_size, rank):
    """Return the parameters of a run that begins with others on rank 1."""
    module = Frozen()
    if rank:
        nn.init.zeros_(module.a[0].weight)
    quiet("fsdp", {}).fit(module, batches(module.steps, rank, world_size))
    return {name: value.clone() for name, value in module.state_dict().items()}


class Saving(Muon):
    """Muon and AdamW in one network, of which the second has gradients left when it ends."""

    steps = 3

    def on_train_end(self):
        self.saved = self.trainer.backend.training_state(self, self.optimizers())


class Resuming(Muon):
    steps = 5

    def on_train_start(self):
        self.trainer.backend.load_training_state(self, self.optimizers(), self.state)

    def train_on(self, do, opts, noise, data, index):
        super().train_on(do, opts, noise, data, index + Saving.steps)


def save(backend, world_size, rank):
    module = Saving()
    quiet(backend, {}).fit(module, batches(Saving.steps, rank, world_size))
    return module.saved


def resume(backend, saved, world_size, rank):
    """Continue a run from what `save` returned on its ranks; return the parameters."""
    module = Resuming()
    module.load_state_dict(saved[0]["state_dict"])
    own = [part["gradients"] for part in saved]
    mean = {
        label: {name: sum(part[label][name] for part in own) / len(own) for name in held}
        for label, held in own[0].items()
    }
    module.state = {**saved[0], "gradients": mean}
    later = batches(Saving.steps + Resuming.steps, rank, world_size)[Saving.steps :]
    quiet(backend, {}).fit(module, later)
    return {name: value.clone() for name, value in module.state_dict().items()}


class Longer(Muon):
    steps = Saving.steps + Resuming.steps


class OnSomeRanks(Uneven):
    """A loss that reaches ``b`` on rank 0 alone, though every rank calls it."""

    def train_on(self, do, opts, noise, data, index):
        for opt in opts:
            opt.zero_grad()
        out = self.a(noise)
        seen = self.b(out)
        loss = mse_loss(out, data)
        if isinstance(do, Verbs):  # the rows of rank 0
            loss = loss + seen[::2].square().mean()
        elif self.global_rank == 0:
            loss = loss + 2 * seen.square().mean()
        do.accumulate(loss)
        for opt in opts:
            opt.step()


def call_on_some_ranks(options, world_size, rank):
    """Rank 0 alone calls ``b``."""
    module = Uneven()
    module.routed = lambda index: rank == 0
    quiet("fsdp", options).fit(module, batches(module.steps, rank, world_size))


class Looking(Average):
    """Looks at whole parameters in the run, writes into them, and keeps CPU copies."""

    def on_train_end(self):
        backend = self.trainer.backend
        self.shards = {name: tuple(p.to_local().shape) for name, p in self.a.named_parameters()}
        self.copies = backend.to_cpu(dict(self.a.named_parameters()))
        with backend.full_parameters(self.a):
            self.whole = {name: p.detach().clone() for name, p in self.a.named_parameters()}
            with torch.no_grad():
                self.a[0].weight.fill_(3.0)
        self.written = backend.to_cpu(self.a[0].weight)


def look(world_size, rank):
    module = Looking()
    quiet("fsdp", {}).fit(module, batches(2, rank, world_size))
    same = all(torch.equal(module.copies[name], module.whole[name]) for name in module.whole)
    return module.shards, same, module.written.unique().tolist(), module.a[0].weight.unique().tolist()


class Wide(Recipe):
    """One network whose first matrix has fewer rows than there are ranks."""

    def make(self):
        self.a = mlp(5, 12, hidden=2)

    def configure_optimizers(self):
        return sgd(self.a.parameters())

    def train_on(self, do, opts, noise, data, index):
        (opt,) = opts
        opt.zero_grad()
        do.accumulate(mse_loss(self.a(noise), data))
        do.clip(opt, 0.5)
        opt.step()


class Early(Recipe):
    """Looks at gradients between the backward and the step, in a way that is given; `before` prepares it."""

    steps = 2

    def __init__(self, look, before=None):
        super().__init__()
        self.look, self.before = look, before

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(50 * self.b(self.a(batch[0])).square().mean())
        if self.before is not None:
            self.before(self, opt)
        self.look(self)
        opt.step()


def clip_by_torch(module):
    nn.utils.clip_grad_norm_(module.parameters(), 0.2)


def clip_values_by_torch(module):
    nn.utils.clip_grad_value_(module.parameters(), 0.01)


def norm_by_torch(module):
    nn.utils.get_total_norm([p.grad for p in module.a.parameters() if p.grad is not None])


def drop_by_module(module):
    module.zero_grad()


def write_by_hand(module):
    for parameter in module.a.parameters():
        parameter.grad = None


def copy_parameters(module):
    copy.deepcopy(list(module.a.parameters()))


def finalize(module, opt):
    opt.finalize()


def look_early(look, before, options, world_size, rank):
    """Return the parameters after a training that looks at gradients, or the error; and whether torch is left alone."""
    module = Early(look, before)
    try:
        quiet("fsdp", options).fit(module, batches(module.steps, rank, world_size))
        outcome = {name: value.clone() for name, value in module.state_dict().items()}
    except ProtocolError as error:
        outcome = str(error)
    return outcome, "grad" not in vars(DTensor)


def look_early_by_hand(look):
    """Return the parameters of the plain loop on whole batches."""
    module = Early(look)
    opt = module.configure_optimizers()
    for batch in batches(module.steps):
        opt.zero_grad()
        (50 * module.b(module.a(batch[0])).square().mean()).backward()
        look(module)
        opt.step()
    return module.state_dict()


def clip_kept(module):
    nn.utils.clip_grad_norm_(module.kept, 0.2)


def decay_kept(module):
    module.manual_backward(sum(p.square().sum() for p in module.kept))


def count_kept(module):
    sum(p.numel() for p in module.kept)


def freeze_kept(module):
    for parameter in module.kept:
        parameter.requires_grad_(False)


def drop_kept(module):
    for parameter in module.kept:
        parameter.grad = None


def average_kept(module):
    copy.deepcopy(module.kept)


def use_kept(use, world_size, rank):
    """Return the error of a training that uses parameters kept in ``__init__``; and whether one leaves them plain."""
    module = Early(use)
    module.kept = list(module.a.parameters())
    made = [(type(p), p.shape) for p in module.kept]
    try:
        quiet("fsdp", {}).fit(module, batches(module.steps, rank, world_size))
        said = ""
    except ProtocolError as error:
        said = str(error)
    spared = Early(lambda module: {p: p.requires_grad for p in module.kept})
    spared.kept = list(spared.a.parameters())
    quiet("fsdp", {}).fit(spared, batches(spared.steps, rank, world_size))
    again = all(p is q for p, q in zip(spared.kept, spared.a.parameters(), strict=True))
    return said, again and made == [(type(p), p.shape) for p in spared.kept]
