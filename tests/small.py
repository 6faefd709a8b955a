"""The small things most tests train: data, a module of one layer, and a Trainer that writes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from xtrain import LightningModule, Trainer


def rows(count: int = 8, seed: int = 0) -> Tensor:
    """`count` rows of three numbers, always the same."""
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def loader(batches: int = 4, seed: int = 0) -> DataLoader[Any]:
    """A sized loader of `batches` batches with two rows each."""
    return DataLoader(rows(2 * batches, seed), batch_size=2)  # type: ignore[arg-type]  # a tensor is a dataset


def net(seed: int = 0) -> nn.Linear:
    """A layer with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 1)


# A loss scale at which nothing here overflows.
SCALED = {"precision": "16-mixed", "scaler_kwargs": {"init_scale": 4.0}}


class Small(LightningModule):
    """Manual optimization of one layer; remembers the batch indices it trained on."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = net(seed)
        self.seen: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch).pow(2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch_idx)
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(rows(2) if batch is None else batch))
        opt.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Automatic(Small):
    """The same in automatic optimization."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.automatic_optimization = True

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(batch_idx)
        return self.loss(batch)


def trainer(**options: Any) -> Trainer:
    """A Trainer for one epoch on the CPU, unless told otherwise, without a progress bar."""
    if not options.keys() & {"backend", "accelerator", "strategy"}:
        options["backend"] = "cpu"
    if not options.keys() & {"max_epochs", "max_steps", "fast_dev_run"}:
        options["max_epochs"] = 1
    return Trainer(**{"enable_progress_bar": False, **options})


def trained(
    source: Any = "sized", module: Any = None, *, validate: Any = None, steps: int | None = None, **options: Any
) -> tuple[Any, Trainer]:
    """Fit a module on four batches (or on `source`) and return it with its Trainer."""
    module = module or Small()
    run = trainer(**options)
    run.fit(module, loader() if isinstance(source, str) else source, validate, steps=steps)
    return module, run


def plain(update: Any, epochs: int = 1, batches: int = 4, optimizer: Any = None) -> nn.Linear:
    """Run ``update(layer, optimizer, batch, index)`` over the batches of `loader`, as anyone would by hand."""
    layer = net()
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.1)))(layer.parameters())
    for _ in range(epochs):
        for index, batch in enumerate(loader(batches)):
            update(layer, optimizer, batch, index)
    return layer


def square(layer: nn.Module, batch: Tensor) -> Tensor:
    return layer(batch).pow(2).mean()


def says(error: BaseException, *parts: str) -> None:
    """Check that a message tells what was expected, what came and the corrected line, and contains `parts`."""
    text = str(error)
    for part in ("Expected ", "Received: ", "Fix:  ", *parts):
        assert part in text, f"{part!r} is missing in: {text}"


class Doing(Small):
    """A training step given as a function of the module, its optimizer and a batch."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self.begun = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.begun += 1
        if self.body is None:
            return super().training_step(batch, batch_idx)
        return self.body(self, self.optimizers(), batch)


def refused(error: type[Exception], body: Any, *parts: str, batches: int = 1, **options: Any) -> None:
    """Check that `body` is refused with `parts`, and that the module trains afterwards as if nothing had been."""
    module = Doing(body)
    with pytest.raises(error) as caught:
        trained(loader(), module, **options)
    says(caught.value, *parts)
    assert module.begun == batches
    module.body = None
    module.zero_grad()
    module.net.load_state_dict(net().state_dict())
    trained(loader(), module)
    assert_equal(module.net, trained(loader())[0].net)


def assert_equal(module: nn.Module, reference: nn.Module, tolerance: float = 1e-6) -> None:
    """Check that two networks have the same parameters."""
    for (name, ours), theirs in zip(module.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=f"{name}: {ours} != {theirs}")
