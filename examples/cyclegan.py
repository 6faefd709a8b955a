"""CycleGAN (Zhu et al., 2017): from plain digits to bold white ones on black and back, without a single pair.

    python examples/cyclegan.py
    torchrun --standalone --nproc_per_node=2 examples/cyclegan.py
    python examples/cyclegan.py --help

Two loaders, four networks, two optimizers, and a pool of earlier fakes for the discriminators. The two kinds of digits
are of different writers' digits, so there are no pairs to learn from; but the rule that made the bold ones is known, so
the truth can be compared with afterwards. It ends with rows of digits and their translations, and two numbers: how far
a translation is from the truth, and how often a judge of plain digits recognises what came back from bold ones.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Judge, batches, draw_rows, flags, load_split, one_of_each, start
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, mse_loss, pad
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import TensorDataset

from xtrain import LightningModule

WIDTH, CYCLE, POOL = 32, 10.0, 256


def embolden(plain: Tensor) -> Tensor:
    """Return the bold white digits on black of `plain` ones: the rule that is to be found."""
    return -(plain + max_pool2d(pad(plain, (0, 1, 0, 1), value=-1.0), 2, stride=1)) / 2


class Translator(nn.Module):
    """Images ``(n, 1, 8, 8)`` of one kind to those of the other, with values in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, 1, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Discriminator(nn.Module):
    """Images ``(n, 1, 8, 8)`` to scores of their patches ``(n, 1, 4, 4)``: 1 means real."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(WIDTH, 2 * WIDTH, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * WIDTH, 1, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Pool:
    """Fakes of earlier steps: half of those that a discriminator sees are from here, so that it does not forget."""

    def __init__(self) -> None:
        self.images: Tensor | None = None

    def exchange(self, fakes: Tensor) -> Tensor:
        """Keep some of `fakes`, and return as many images, new and old."""
        if self.images is None:
            self.images = fakes.repeat(POOL // len(fakes), 1, 1, 1)
        places = torch.randperm(POOL)[: len(fakes)].to(fakes.device)
        new = (torch.rand(len(fakes), 1, 1, 1) < 0.5).to(fakes.device)
        old = self.images[places]
        self.images = self.images.index_copy(0, places, torch.where(new, old, fakes))
        return torch.where(new, fakes, old)


class CycleGAN(LightningModule):
    """The objective of the paper, with least squares in place of the logarithms."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.to_bold, self.to_plain = Translator(), Translator()
        self.sees_bold, self.sees_plain = Discriminator(), Discriminator()
        self.bold_pool, self.plain_pool = Pool(), Pool()

    def configure_optimizers(self) -> Any:
        translators = [*self.to_bold.parameters(), *self.to_plain.parameters()]
        discriminators = [*self.sees_bold.parameters(), *self.sees_plain.parameters()]
        adams = [torch.optim.Adam(p, lr=5e-4, betas=(0.5, 0.999)) for p in (translators, discriminators)]
        steps = self.trainer.estimated_stepping_batches
        return adams, [LinearLR(adam, 1.0, 0.05, total_iters=steps) for adam in adams]

    # --8<-- [start:step]
    def training_step(self, batch: dict[str, tuple[Tensor]], batch_idx: int) -> None:
        (plain,), (bold,) = batch["plain"], batch["bold"]
        opt_t, opt_d = self.optimizers()

        with self.toggled_optimizer(opt_t):  # the discriminators need no gradients here
            fake_bold, fake_plain = self.to_bold(plain), self.to_plain(bold)
            back = (self.to_plain(fake_bold) - plain).abs().mean() + (self.to_bold(fake_plain) - bold).abs().mean()
            fooled = towards(self.sees_bold(fake_bold), 1.0) + towards(self.sees_plain(fake_plain), 1.0)
            opt_t.zero_grad()
            self.manual_backward(fooled + CYCLE * back.float())
            opt_t.step()

        old_bold, old_plain = self.bold_pool.exchange(fake_bold.detach()), self.plain_pool.exchange(fake_plain.detach())
        loss_bold = towards(self.sees_bold(bold), 1.0) + towards(self.sees_bold(old_bold), 0.0)
        loss_plain = towards(self.sees_plain(plain), 1.0) + towards(self.sees_plain(old_plain), 0.0)
        opt_d.zero_grad()
        self.manual_backward((loss_bold + loss_plain) / 2)
        opt_d.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"fooled": fooled, "cycle": back}, prog_bar=True, on_step=False, on_epoch=True)

    # --8<-- [end:step]

    def predict_step(self, plain: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        return self.to_bold(plain), self.to_plain(embolden(plain))


def towards(scores: Tensor, target: float) -> Tensor:
    """Return the squared distance of `scores` from `target`."""
    return mse_loss(scores.float(), torch.full_like(scores, target, dtype=torch.float32))


def main() -> None:
    options = flags("Translate between two kinds of digits without pairs.", epochs=80).parse_args()
    trainer = start(options, max_epochs=options.epochs)
    digits, held_out = load_split()
    images, labels = held_out.tensors
    half = len(digits) // 2  # no digit is in both sets, not even as a translation
    plain, bold = digits.tensors[0][:half], embolden(digits.tensors[0][half:])
    module = CycleGAN()

    (before,) = trainer.predict(module, [images])
    trainer.fit(module, {"plain": batches(TensorDataset(plain)), "bold": batches(TensorDataset(bold))})
    shown = torch.cat([one_of_each(held_out), images])
    ((to_bold, to_plain),) = trainer.predict(module, [shown])

    if trainer.is_global_zero:
        options.out.mkdir(parents=True, exist_ok=True)
        to_bold, to_plain = to_bold.float().cpu(), to_plain.float().cpu()
        rows = {"plain": shown, "made bold": to_bold, "truth": embolden(shown), "made plain": to_plain}
        draw_rows({label: row[:10] for label, row in rows.items()}, options.out / "cyclegan.png")
        judge = Judge(digits)
        print(f"{'':44}{'before':>8}{'after':>8}")
        for name, measure in {
            "mean distance from the true bold digit": lambda b, _: f"{(b - embolden(images)).abs().mean():.2f}",
            "made plain, recognised by a judge of plain": lambda _, p: f"{judge.accuracy(p, labels):.1%}",
        }.items():
            results = [measure(b.float().cpu(), p.float().cpu()) for b, p in (before, (to_bold[10:], to_plain[10:]))]
            print(f"{name:44}{results[0]:>8}{results[1]:>8}")
        print(f"(real plain digits are recognised: {judge.accuracy(images, labels):.1%})")
        print(f"Picture: cyclegan.png in {options.out}")


if __name__ == "__main__":
    main()
