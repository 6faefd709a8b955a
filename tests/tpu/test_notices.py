"""What the tpu backend tells: recompiles, waits for the device, the last batch. And what it refuses."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch_xla
from counting import Count
from torch import nn
from torch.utils.data import DataLoader
from xtrain_backends.xla.guard import RecompileError

from xtrain import LightningModule, Trainer, errors
from xtrain.testing.experiments.accumulation import AccumulateApart
from xtrain.testing.networks import batches

torch_xla.device()  # before the first backward of this process


class Net(LightningModule):
    """One layer; `look` is called with the loss in every training step."""

    def __init__(self, look: Any = None, factor: Any = lambda batch_idx: 0.5) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.look, self.factor = look, factor

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch["x"] if isinstance(batch, dict) else batch
        opt = self.optimizers()
        opt.zero_grad()
        rows = self.net(x).pow(2).squeeze(1)
        weight = batch["mask"] if isinstance(batch, dict) and "mask" in batch else torch.ones_like(rows)
        scaled = rows * self.factor(batch_idx)
        loss = (scaled * weight).sum() / weight.sum()
        self.manual_backward(loss)
        opt.step()
        if self.look is not None:
            self.look(loss.detach())


def rows(count: int) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1))


def fit(module: Net, loader: Any, epochs: int = 1, backend: str = "tpu", **options: Any) -> Count:
    count = Count()
    quiet = {"max_epochs": epochs, "enable_progress_bar": False, "callbacks": count if backend == "tpu" else None}
    Trainer(backend, backend_options=options or None, **quiet).fit(module, loader)
    return count


def line_of(function: Any, offset: int = 1) -> str:
    return f"{function.__code__.co_filename}:{function.__code__.co_firstlineno + offset}"


# ---------------------------------------------------------------- waits for the device


def look_item(loss: torch.Tensor) -> Any:
    return loss.item()


def look_float(loss: torch.Tensor) -> Any:
    return float(loss)


def look_if(loss: torch.Tensor) -> Any:
    return 1 if loss > 0 else 0


def look_print(loss: torch.Tensor) -> Any:
    return str(loss)


def look_format(loss: torch.Tensor) -> Any:
    return f"{loss:.3f}"


def look_cpu(loss: torch.Tensor) -> Any:
    return loss.cpu()


def look_to(loss: torch.Tensor) -> Any:
    return loss.to("cpu")


@pytest.mark.parametrize("look", [look_item, look_float, look_if, look_print, look_format, look_cpu, look_to])
def test_a_value_asked_for_inside_a_step_is_reported_once_with_its_line(look, caplog):
    fit(Net(look), [rows(4)] * 4)
    notices = [r.getMessage() for r in caplog.records if "asks for a value" in r.getMessage()]
    assert len(notices) == 1
    assert notices[0].startswith(line_of(look))
    assert "cpu" not in vars(torch.Tensor), "torch is restored when the run ends"


def test_a_clean_step_is_not_reported(caplog):
    fit(Net(lambda loss: loss.mean()), [rows(4)] * 4)
    assert caplog.records == []


# ---------------------------------------------------------------- recompiles


def half_then_zero(batch_idx: int) -> float:
    return 0.0 if batch_idx in (5, 7) else 0.5 + batch_idx / 100


def test_a_number_that_becomes_zero_is_reported(caplog):
    count = fit(Net(factor=half_then_zero), [rows(4)] * 9)
    assert [i for i, n in enumerate(count["compiles"]) if n and i > 1] == [5]
    (notice,) = [r.getMessage() for r in caplog.records]
    assert "Expected no graph to be compiled after the warm-up" in notice
    assert "a number in the step became 0, 1" in notice


def test_accumulating_over_several_batches_is_not_reported(caplog):
    """Two optimizers that step every second and every third batch make gradients, or add to them, in six ways."""
    trainer = Trainer("tpu", max_epochs=3, enable_progress_bar=False, backend_options={"strict": True})
    trainer.fit(AccumulateApart(), batches(6))
    assert caplog.records == []


def test_strict_raises_and_names_the_line():
    with pytest.raises(RecompileError) as caught:
        fit(Net(factor=half_then_zero), [rows(5)] * 9, strict=True)  # a shape that this process has not compiled yet
    assert "training_step@" in str(caught.value)
    assert f"test_notices.py:{line_of(Net.training_step, 6).rsplit(':', 1)[1]}" in str(caught.value)


def test_another_shape_or_dtype_is_reported_with_both(caplog):
    fit(Net(), [rows(4)] * 3 + [rows(6)] * 3)
    assert "float32[4, 3] became float32[6, 3]" in caplog.text
    with pytest.raises(RecompileError, match=r"float32\[4, 3\] became float32\[7, 3\]"):
        fit(Net(), [rows(4)] * 3 + [rows(7)], strict=True)


# ---------------------------------------------------------------- the smaller last batch


def test_by_default_the_last_batch_is_compiled_once_and_that_is_said(caplog):
    count = fit(Net(), DataLoader(rows(19), batch_size=4), epochs=3)
    assert [i for i, n in enumerate(count["compiles"]) if n and i > 1] in ([4], [4, 9])
    assert [r.getMessage()[:46] for r in caplog.records] == ["A last batch has 3 rows instead of 4: one more"]


def test_strict_accepts_the_last_batch_that_was_chosen():
    fit(Net(), DataLoader(rows(19), batch_size=4), epochs=3, strict=True)


def test_the_last_batch_can_be_left_out():
    module, plain = Net(), Net()
    count = fit(module, DataLoader(rows(19), batch_size=4), epochs=2, last_batch="drop")
    fit(plain, DataLoader(rows(19), batch_size=4, drop_last=True), epochs=2, backend="cpu")
    assert len(count.rows) == 8
    assert sum(count["compiles"]) <= 2
    torch.testing.assert_close(module.net.weight.detach().cpu(), plain.net.weight.detach())


def test_the_last_batch_can_be_filled_up_and_masked():
    module, plain = Net(), Net()
    loader = [{"x": x} for x in rows(19).split(4)]
    count = fit(module, loader, epochs=2, last_batch="pad")
    fit(plain, loader, epochs=2, backend="cpu")
    assert sum(count["compiles"]) <= 2
    torch.testing.assert_close(module.net.weight.detach().cpu(), plain.net.weight.detach())


def test_tuples_and_lists_get_the_mask_as_one_more_item():
    class Pairs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, *mask = batch
            super().training_step({"x": x, **({"mask": mask[0]} if mask else {})}, batch_idx)

    for make in (tuple, list):
        module, plain = Pairs(), Pairs()
        loader = [make([x]) for x in rows(19).split(4)]
        count = fit(module, loader, epochs=2, last_batch="pad")
        fit(plain, loader, epochs=2, backend="cpu")
        assert sum(count["compiles"]) <= 2
        torch.testing.assert_close(module.net.weight.detach().cpu(), plain.net.weight.detach())


def test_padding_needs_a_place_for_the_mask():
    for loader, received in ((list(rows(19).split(4)), "a Tensor"), ([{"x": rows(2), "mask": 1}], "a key 'mask'")):
        with pytest.raises(errors.ConfigurationError, match="dicts, tuples or lists") as caught:
            fit(Net(), loader, last_batch="pad")
        assert received in str(caught.value)
        assert "or (x, y), or last_batch='drop'" in str(caught.value)


def test_what_becomes_of_the_last_batch_is_one_of_three():
    with pytest.raises(errors.ConfigurationError, match="last_batch out of compile, drop, pad"):
        Trainer("tpu", backend_options={"last_batch": "keep"})


# ---------------------------------------------------------------- the rest


def test_lbfgs_says_once_that_it_reads_back(caplog):
    class Net2(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe")

        def training_step(self, batch: Any, batch_idx: int) -> None:
            def closure() -> Any:
                opt.zero_grad()
                loss = self.net(batch).pow(2).mean()
                self.manual_backward(loss)
                return loss

            opt = self.optimizers()
            opt.step(closure)

    module, plain = Net2(), Net2()
    count = fit(module, [rows(8)] * 3)
    assert [r.getMessage()[:5] for r in caplog.records] == ["LBFGS"]
    assert sum(count["compiles"]) <= 2
    fit(plain, [rows(8)] * 3, backend="cpu")
    torch.testing.assert_close(module.net.weight.detach().cpu(), plain.net.weight.detach(), atol=1e-5, rtol=1e-5)


def test_the_compile_cache_is_off_in_a_rehearsal_and_has_a_folder_per_rank(tmp_path, monkeypatch):
    from xtrain_backends.xla import XLA

    assert XLA()._cache_folder() is None
    assert XLA(compile_cache=tmp_path)._cache_folder() == tmp_path / "rank0"
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    monkeypatch.setenv("PJRT_LOCAL_PROCESS_RANK", "3")
    assert XLA()._cache_folder().parts[-3:] == ("xtrain", "xla", "rank3")
    assert XLA(compile_cache=False)._cache_folder() is None


@pytest.fixture(autouse=True)
def _listen(caplog):
    caplog.set_level(logging.WARNING, logger="xtrain")
