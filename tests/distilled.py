"""The distillation of `examples/dmd2.py`, small, by the Trainer on any number of processes and by a plain loop."""

import sys
from pathlib import Path

import torch
from torch import nn

from xtrain import Trainer

EXAMPLES = str(Path(__file__).resolve().parent.parent / "examples")
sys.path.insert(0, EXAMPLES)
try:
    import dmd2
finally:
    sys.path.remove(EXAMPLES)

ROWS, STEPS = 8, 5  # the student has its turn in the first step and in the last


class Distillation(dmd2.Distillation):
    """Draws for the whole batch, of which each process takes its rows."""

    def __init__(self, world_size=1, rank=0):
        torch.manual_seed(0)
        super().__init__(dmd2.Denoiser())
        self.place = slice(rank, None, world_size)
        self.generator = torch.Generator().manual_seed(1)

    def draw(self, rows, *shape):
        return torch.randn(ROWS, *shape, generator=self.generator)[self.place]


def batches_of(world_size=1, rank=0):
    generator = torch.Generator().manual_seed(2)
    whole = [(torch.randn(ROWS, 1, 8, 8, generator=generator), torch.arange(ROWS) % 10) for _ in range(STEPS)]
    return [(images[rank::world_size], labels[rank::world_size]) for images, labels in whole]


def by_trainer(backend, options, world_size=1, rank=0):
    """Return the parameters of all networks after a few steps."""
    module = Distillation(world_size, rank)
    quiet = {"max_epochs": 1, "logger": False, "enable_progress_bar": False}
    Trainer(backend, backend_options=options, **quiet).fit(module, batches_of(world_size, rank))
    return {name: value.clone() for name, value in module.state_dict().items()}


def by_hand():
    """Return the same from plain PyTorch on whole batches; networks and losses are the example's."""
    module = Distillation()
    opt_s, opt_f, opt_d = module.configure_optimizers().values()

    def update(opt, name, loss, limit, decay):
        opt.zero_grad()
        loss.backward()
        network, average = getattr(module, name), module.averages[name]
        nn.utils.clip_grad_norm_(network.parameters(), limit)
        opt.step()
        for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
            slow.data = decay * slow.data + (1 - decay) * fast.data

    for index, (real, labels) in enumerate(batches_of()):
        fake = module.generate(module.student, labels)
        update(opt_f, "fake_score", module.denoising_loss(module.fake_score, fake.detach(), labels), 2.0, 0.9)
        if index in (0, 2, 4):
            on_real = module.discriminator(*module.noised(real), labels)
            on_fake = module.discriminator(*module.noised(fake.detach()), labels)
            loss = nn.functional.softplus(-on_real).mean() + nn.functional.softplus(on_fake).mean()
            update(opt_d, "discriminator", loss, 1.0, 0.9)
        if index in (0, 4):
            update(opt_s, "student", module.student_loss(fake, labels), 1.0, 0.99)
    return module.state_dict()


def assert_same(received, expected, tolerance):
    assert received.keys() == expected.keys()
    for name, value in expected.items():
        text = f"{name} is another one"
        torch.testing.assert_close(received[name], value, atol=tolerance, rtol=tolerance, msg=text)
