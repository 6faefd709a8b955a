"""Distil a diffusion model of handwritten digits to one step (DMD2), by manual optimization, on any backend.

    python examples/dmd2.py
    python examples/dmd2.py --backend fsdp --devices 2
    python examples/dmd2.py --help

A teacher learns to take noise off digits; it draws in 16 steps. A student learns to draw what the teacher draws,
in one step: it follows the difference between the teacher's score and the score of its own samples, which a third
network learns all the time, and a discriminator tells its samples from real digits. Each of the three has an
optimizer, a frequency, a clip and a moving average of its own.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from common import CLASSES, Curves, Judge, batches, draw_curves, draw_rows, flags, load_split, one_of_each, start
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from xtrain import LightningModule

WIDTH, STEPS, SPREAD, LOWEST, HIGHEST = 192, 16, 0.75, 0.02, 6.0  # SPREAD: standard deviation of pixels
# Of each network in training: every how many batches, learning rate, largest norm of a gradient, decay of its average.
PLAN = {
    "student": (4, 3e-4, 1.0, 0.99),
    "fake_score": (1, 6e-4, 2.0, 0.9),
    "discriminator": (2, 6e-4, 1.0, 0.9),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.last(silu(self.first(self.norm(x + condition))))


class Network(nn.Module):
    """Noisy images ``(n, 1, 8, 8)``, noise levels ``(n, 1)`` and labels ``(n,)`` to ``(n, outputs)``."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.classes, self.level = nn.Embedding(CLASSES, WIDTH), nn.Linear(16, WIDTH)
        self.first, self.last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, outputs)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, noisy: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        waves = level.log() * torch.arange(1, 9, device=level.device, dtype=level.dtype) / 2
        condition = self.classes(labels) + self.level(torch.cat([waves.sin(), waves.cos()], dim=1))
        x = self.first(noisy.flatten(1) / (level.square() + SPREAD**2).sqrt())
        for block in self.blocks:
            x = block(x, condition)
        return self.last(x)


class Denoiser(Network):
    """Noisy images to clean ones; what the network learns has the same size at every noise level."""

    def __init__(self) -> None:
        super().__init__(64)

    def forward(self, noisy: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        learned = super().forward(noisy, level, labels).view_as(noisy)
        total, level = level.square() + SPREAD**2, level[:, :, None, None]
        return noisy * (SPREAD**2 / total)[:, :, None, None] + learned * level * SPREAD / total.sqrt()[:, :, None, None]


class Diffusion(LightningModule):
    """What teacher and distillation share: draws, noise, and the loss of a denoiser."""

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)  # each process draws its own

    def noised(self, images: Tensor) -> tuple[Tensor, Tensor]:
        level = (1.2 * self.draw(len(images), 1) - 0.6).exp().clamp(LOWEST, HIGHEST)
        return images + level[:, :, None, None] * self.draw(*images.shape), level

    def denoising_loss(self, denoiser: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        noisy, level = self.noised(images)
        weight = (level.square() + SPREAD**2) / (level * SPREAD).square()
        return (weight * (denoiser(noisy, level, labels) - images).flatten(1).square()).mean()


class Teacher(Diffusion):
    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.denoiser.parameters(), lr=1e-3)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.denoising_loss(self.denoiser, *batch)

    def predict_step(self, labels: Tensor, batch_idx: int) -> Tensor:
        """Draw from noise in STEPS steps (Euler), in each of which the network is asked once."""
        levels = torch.linspace(HIGHEST ** (1 / 5), LOWEST ** (1 / 5), STEPS, device=self.device) ** 5
        x = levels[0] * self.draw(len(labels), 1, 8, 8)
        for now, following in zip(levels, [*levels[1:], torch.zeros_like(levels[0])], strict=True):
            clean = self.denoiser(x, now.expand(len(labels), 1).to(x.dtype), labels)
            x = clean + (x - clean) * (following / now).to(x.dtype)
        return x


class Distillation(Diffusion):
    """Four networks, three optimizers, one training step."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.teacher = copy.deepcopy(teacher).requires_grad_(False)
        self.student, self.fake_score, self.discriminator = copy.deepcopy(teacher), copy.deepcopy(teacher), Network(1)
        self.averages = nn.ModuleDict({name: copy.deepcopy(getattr(self, name)) for name in PLAN}).requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return {
            name: torch.optim.Adam(getattr(self, name).parameters(), lr=rate, betas=(0.5, 0.99))
            for name, (_, rate, _, _) in PLAN.items()
        }

    def generate(self, student: nn.Module, labels: Tensor) -> Tensor:
        level = torch.full((len(labels), 1), HIGHEST, device=self.device, dtype=self.dtype)
        return student(HIGHEST * self.draw(len(labels), 1, 8, 8), level, labels)

    def update(self, name: str, loss: Tensor) -> None:
        opt, (_, _, limit, decay) = self.optimizers()[name], PLAN[name]
        opt.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(opt, gradient_clip_val=limit)
        opt.step()
        with torch.no_grad():
            for slow, fast in zip(self.averages[name].parameters(), getattr(self, name).parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        self.log(name, loss, prog_bar=True, on_step=False, on_epoch=True)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real, labels = batch
        turn = {name: batch_idx % every == 0 for name, (every, *_) in PLAN.items()}
        with torch.set_grad_enabled(turn["student"]):
            fake = self.generate(self.student, labels)
        self.update("fake_score", self.denoising_loss(self.fake_score, fake.detach(), labels))
        if turn["discriminator"]:
            score_real = self.discriminator(*self.noised(real), labels)
            score_fake = self.discriminator(*self.noised(fake.detach()), labels)
            self.update("discriminator", (softplus(-score_real) + softplus(score_fake)).mean())
        if turn["student"]:
            with self.toggled_optimizer(self.optimizers()["student"]):
                self.update("student", self.student_loss(fake, labels))

    def student_loss(self, fake: Tensor, labels: Tensor) -> Tensor:
        noisy, level = self.noised(fake)
        with torch.no_grad():
            wanted, own = self.teacher(noisy, level, labels), self.fake_score(noisy, level, labels)
            away = (own - wanted) / (fake - wanted).abs().mean(dim=(1, 2, 3), keepdim=True)
        matching = (away * fake).mean()  # its gradient is `away`, the difference of the scores
        return matching + 0.02 * softplus(-self.averages["discriminator"](noisy, level, labels)).mean()

    def predict_step(self, labels: Tensor, batch_idx: int) -> Tensor:
        return self.generate(self.averages["student"], labels)


def main() -> None:
    parser = flags("Distil a diffusion model of handwritten digits to one step.", epochs=100)
    parser.add_argument("--teacher-epochs", type=int, default=120, help="before that (default: 120)")
    options = parser.parse_args()
    digits, held_out = load_split()
    labels = [torch.arange(100) % CLASSES] * 10

    trainer, teacher = start(options, max_epochs=options.teacher_epochs), Teacher()
    trainer.fit(teacher, batches(digits))
    drawn = {f"teacher, {STEPS} steps": torch.cat(trainer.predict(teacher, labels))}
    curves = Curves(*PLAN)
    trainer, student = start(options, max_epochs=options.epochs, callbacks=[curves]), Distillation(teacher.denoiser)
    drawn["teacher, 1 step"] = torch.cat(trainer.predict(student, labels))  # the student before it has learned
    started = time.perf_counter()
    trainer.fit(student, batches(digits))
    rate = trainer.global_step / (time.perf_counter() - started)
    drawn["student, 1 step"] = torch.cat(trainer.predict(student, labels))

    if trainer.is_global_zero:
        options.out.mkdir(parents=True, exist_ok=True)
        drawn = {name: images.float().cpu().clamp(-1, 1) for name, images in drawn.items()}
        judge, (real, _), classes = Judge(digits), held_out.tensors, torch.cat(labels)
        print(f"{'':20}{'recognised':>12}{'Fréchet distance':>18}")
        for name, images in drawn.items():
            print(f"{name:20}{judge.accuracy(images, classes):>12.1%}{judge.distance(images, real):>18.1f}")
        rows = {"real": one_of_each(digits), **{name: images[:CLASSES] for name, images in drawn.items()}}
        draw_rows(rows, options.out / "dmd2.png")
        draw_curves(curves.values, options.out / "dmd2-losses.png", xlabel="epoch", ylabel="loss", title="DMD2")
        print(f"{rate:.1f} steps of the distillation per second. Pictures: {options.out}/dmd2.png, dmd2-losses.png")


if __name__ == "__main__":
    main()
