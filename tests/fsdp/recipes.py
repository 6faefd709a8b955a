"""Training recipes, each written once: xtrain's verbs and plain PyTorch's run the same step."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import mse_loss, softplus

from xtrain import LightningModule, Trainer

ROWS, WIDTH = 8, 12


def mlp(inputs, outputs, hidden=10, activation=nn.Tanh):
    return nn.Sequential(
        nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, hidden), activation(), nn.Linear(hidden, outputs)
    )


def sgd(parameters, lr=0.05):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


class Verbs:
    """Plain PyTorch, on the whole batch."""

    def __init__(self, opts):
        self.opts, self.norms = opts, []

    def accumulate(self, loss, **options):
        loss.backward(**options)

    def clip(self, opt, value, algorithm="norm"):
        parameters = [p for group in opt.param_groups for p in group["params"]]
        if algorithm == "norm":
            self.norms.append(float(nn.utils.clip_grad_norm_(parameters, value)))
        else:
            nn.utils.clip_grad_value_(parameters, value)

    @contextmanager
    def toggled(self, opt):
        every = {p: p.requires_grad for o in self.opts for group in o.param_groups for p in group["params"]}
        mine = {p for group in opt.param_groups for p in group["params"]}
        for p, before in every.items():
            p.requires_grad_(before and p in mine)
        yield
        for p, before in every.items():
            p.requires_grad_(before)


class Recipe(LightningModule):
    """Networks ``a`` and ``b``; `train` is given the verbs, the optimizers and rows of noise and data."""

    steps = 4

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(3)
        self.make()
        self.norms = []

    def make(self):
        self.a, self.b = mlp(5, WIDTH), mlp(WIDTH, 1)

    def configure_optimizers(self):
        return sgd(self.a.parameters()), sgd(self.b.parameters())

    def train_on(self, do, opts, noise, data, index):
        raise NotImplementedError

    # ---- xtrain's verbs

    def accumulate(self, loss, **options):
        self.manual_backward(loss, **options)

    def clip(self, opt, value, algorithm="norm"):
        norm = self.clip_gradients(opt, gradient_clip_val=value, gradient_clip_algorithm=algorithm)
        if algorithm == "norm":
            self.norms.append(float(norm))

    def toggled(self, opt):
        return self.toggled_optimizer(opt)

    def training_step(self, batch, batch_idx):
        opts = self.optimizers()
        self.train_on(self, opts if isinstance(opts, list) else [opts], *batch, batch_idx)


def batches(count, rank=0, world_size=1):
    generator = torch.Generator().manual_seed(1)
    whole = [[torch.randn(ROWS, width, generator=generator) for width in (5, WIDTH)] for _ in range(count)]
    return [tuple(part[rank::world_size] for part in pair) for pair in whole]


def by_hand(make):
    """Return the parameters and the norms of the plain loop."""
    module = make()
    opts = module.configure_optimizers()
    opts = list(opts) if isinstance(opts, tuple) else [opts]
    do = Verbs(opts)
    for index, (noise, data) in enumerate(batches(module.steps)):
        module.train_on(do, opts, noise, data, index)
    return module.state_dict(), do.norms


def by_xtrain(make, options, backend="fsdp", precision="32-true", world_size=1, rank=0, **flags):
    """Return the same from a run of the Trainer, in plain tensors."""
    module = make()
    trainer = quiet(backend, options, precision=precision, **flags)
    trainer.fit(module, batches(module.steps, rank, world_size))
    return {name: value.clone() for name, value in module.state_dict().items()}, module.norms


def quiet(backend, options, **flags):
    settings = {"max_epochs": 1, "logger": False, "enable_progress_bar": False} | flags
    return Trainer(backend=backend, backend_options=dict(options) or None, **settings)


class Wgan(Recipe):
    """The penalty's inner gradient comes first; forwards follow before the backward that needs its graph."""

    def train_on(self, do, opts, noise, data, index):
        a_opt, b_opt = opts
        with do.toggled(b_opt):
            b_opt.zero_grad()
            fake = self.a(noise).detach()
            mixed = (0.3 * data + 0.7 * fake).requires_grad_()
            (inner,) = torch.autograd.grad(self.b(mixed).sum(), mixed, create_graph=True)
            loss = self.b(fake).mean() - self.b(data).mean()
            do.accumulate(10 * (inner.norm(dim=1) - 1).square().mean())
            do.accumulate(loss)
            do.clip(b_opt, 0.5)
            b_opt.step()
        a_opt.zero_grad()
        do.accumulate(-self.b(self.a(noise)).mean())  # untoggled: it strays into b
        do.clip(a_opt, 0.1)
        a_opt.step()


class Frozen(Recipe):
    """Backwards pass through a frozen network, which trains right after; the first forward is a frozen one."""

    def train_on(self, do, opts, noise, data, index):
        a_opt, b_opt = opts
        with do.toggled(a_opt):
            a_opt.zero_grad()
            for part in noise.chunk(2):
                do.accumulate(softplus(-self.b(self.a(part))).mean() / 2)
            do.clip(a_opt, 0.02)
            a_opt.step()
        fake = self.a(noise)
        with do.toggled(b_opt):
            b_opt.zero_grad()
            do.accumulate(softplus(self.b(fake.detach())).mean())
            do.accumulate(softplus(-self.b(data)).mean())
            do.clip(b_opt, 0.03, "value")
            b_opt.step()


class Muon(Recipe):
    """Two optimizers in one network: matrices by Muon, the rest by AdamW; one accumulates longer."""

    def make(self):
        self.a = mlp(5, WIDTH)

    def configure_optimizers(self):
        matrices = [p for p in self.a.parameters() if p.dim() == 2]
        return (
            torch.optim.Muon(matrices, lr=0.02),
            torch.optim.AdamW([p for p in self.a.parameters() if p.dim() != 2], lr=0.01, eps=1e-3),
        )

    def train_on(self, do, opts, noise, data, index):
        do.accumulate(mse_loss(self.a(noise), data))
        do.clip(opts[0], 0.3)
        opts[0].step()
        opts[0].zero_grad()
        if index % 2:
            do.clip(opts[1], 0.2)
            opts[1].step()
            opts[1].zero_grad()


class Halves(Recipe):
    """Two optimizers in each layer, which share backwards; each is clipped, and one steps before the other's clip."""

    def make(self):
        self.a = mlp(5, WIDTH)

    def configure_optimizers(self):
        matrices = [p for p in self.a.parameters() if p.dim() == 2]
        return sgd(matrices), sgd([p for p in self.a.parameters() if p.dim() != 2])

    def train_on(self, do, opts, noise, data, index):
        for opt in opts:
            opt.zero_grad()
        for part, target in zip(noise.chunk(4), data.chunk(4), strict=True):
            do.accumulate(mse_loss(self.a(part), target) / 4)
        for opt in opts:
            do.clip(opt, 0.2)
            opt.step()


class Tied(Recipe):
    """A matrix twice in one network, a layer in two networks, a scalar and a free parameter on the module."""

    def make(self):
        self.a, self.b = mlp(5, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, WIDTH))
        self.a[4].weight = nn.Parameter(self.a[4].weight.detach().clone())
        self.b[0] = nn.Linear(5, 5)
        self.c = nn.Sequential(self.b[0], nn.Linear(5, 1))
        self.a.register_parameter("gain", nn.Parameter(torch.tensor(0.7)))
        self.free = nn.Parameter(torch.ones(WIDTH))
        self.head = Twice()

    def configure_optimizers(self):
        return sgd(self.parameters())

    def train_on(self, do, opts, noise, data, index):
        (opt,) = opts
        opt.zero_grad()
        hidden = self.a(noise) * self.a.gain
        loss = mse_loss(self.b(hidden) * self.free, data) + self.c(hidden).square().mean()
        do.accumulate(loss + self.head(data).square().mean())
        do.clip(opt, 1.0)
        opt.step()


class Twice(nn.Module):
    """Uses one matrix in two layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(WIDTH, 3, bias=False), nn.Linear(WIDTH, 3, bias=False)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.embed(x) * self.scale + self.out(x.sin())


class Average(Recipe):
    """A running average of the network, made in ``__init__``, teaches it; a layer is frozen from the start."""

    def make(self):
        self.a = mlp(5, WIDTH)
        self.slow = mlp(5, WIDTH).requires_grad_(False)
        self.a[2].requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.Adam(self.a.parameters(), lr=0.01, eps=1e-3)

    def train_on(self, do, opts, noise, data, index):
        (opt,) = opts
        opt.zero_grad()
        with torch.no_grad():
            target = self.slow(noise)
        do.accumulate(mse_loss(self.a(noise), data) + mse_loss(self.a(noise * 2), target))
        opt.step()
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.a.parameters(), strict=True):
                slow.lerp_(fast, 0.2)


class Encoder(nn.Module):
    """A network whose parameters other methods than forward use."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, WIDTH)
        self.bias = nn.Parameter(torch.zeros(6))

    def encode(self, x):
        return torch.tanh(self.first(x) + self.bias)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x) + self.bias))


class Methods(Recipe):
    """Calls ``encode`` beside forward."""

    def make(self):
        self.a = Encoder()

    def configure_optimizers(self):
        return sgd(self.a.parameters())

    def train_on(self, do, opts, noise, data, index):
        (opt,) = opts
        opt.zero_grad()
        do.accumulate(mse_loss(self.a(noise), data) + self.a.encode(noise).square().mean())
        do.clip(opt, 0.3)
        opt.step()


class Lbfgs(Recipe):
    """A line search over a network and a parameter on the module itself, together."""

    def make(self):
        self.a, self.free = mlp(5, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4, history_size=3)

    def train_on(self, do, opts, noise, data, index):
        (opt,) = opts

        def closure():
            opt.zero_grad()
            loss = mse_loss(self.a(noise) * self.free, data)
            do.accumulate(loss)
            return loss

        opt.step(closure)


class Uneven(Recipe):
    """A layer that only some rows reach: on some ranks, with no gradient on the others."""

    def train_on(self, do, opts, noise, data, index):
        (a_opt, b_opt) = opts
        for opt in opts:
            opt.zero_grad()
        out = self.a(noise)
        loss = mse_loss(out, data)
        if self.routed(index):
            loss = loss + self.b(out).square().mean()
        do.accumulate(loss)
        a_opt.step()
        b_opt.step()

    def routed(self, index):
        return True


RECIPES = {cls.__name__: cls for cls in (Wgan, Frozen, Muon, Halves, Tied, Average, Lbfgs)}
