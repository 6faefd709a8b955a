"""SPMD: four virtual devices train what one process trains; sixty-four compile, and their collectives are counted."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from counting import Count
from fresh import fresh, fresh_process
from torch import nn

from xtrain import LightningModule, Trainer, errors

ROWS = 64


class Net(LightningModule):
    """Two clipped optimizers over two small networks."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.a = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
        self.b = nn.Linear(8, 8)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.a.parameters(), lr=0.3), torch.optim.Adam(self.b.parameters(), lr=0.01, eps=1e-3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x = batch["x"]
        for net, opt in zip((self.a, self.b), self.optimizers(), strict=True):
            opt.zero_grad()
            loss = (net(x) - x).pow(2).mean()
            self.manual_backward(loss)
            self.log(f"norm_{type(opt.optimizer).__name__}", self.clip_gradients(opt, gradient_clip_val=0.05))
            opt.step()
        self.batch = batch


def data(sizes: list[int]) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(n, 8, generator=generator), "factor": torch.tensor(2.0), "name": "b"} for n in sizes]


def fit(sizes: list[int], **options: Any) -> tuple[Net, Count]:
    module, count = Net(), Count()
    quiet = {"max_epochs": 1, "enable_progress_bar": False, "callbacks": count}
    Trainer("tpu", **quiet, **options).fit(module, data(sizes))
    return module, count


def on_mesh(mesh: dict[str, int] | None, sizes: list[int], devices: int | None = None) -> dict[str, Any]:
    import torch_xla

    module, count = fit(sizes, devices=devices, backend_options={"mesh": mesh})
    layout = torch_xla._XLAC._get_xla_sharding_spec
    found = {"rows": count.rows, "batch": layout(module.batch["x"]), "scalar": layout(module.batch["factor"])}
    found["weight"] = layout(module.a[0].weight)
    adam = module.trainer.run.life.optimizers[1]
    found["moment"] = layout(adam.state[module.b.weight]["exp_avg"])
    plain = Net()
    Trainer("cpu", max_epochs=1, enable_progress_bar=False).fit(plain, data(sizes))
    pairs = zip(module.state_dict().values(), plain.state_dict().values(), strict=True)
    return found | {"error": max((a.cpu() - b).abs().max().item() for a, b in pairs)}


@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 2, "fsdp": 2}, {"fsdp": 4}], ids=str)
def test_a_mesh_trains_as_one_process_does(mesh):
    found = fresh(on_mesh, mesh, [ROWS] * 8 + [7], CPU_NUM_DEVICES="4")
    assert found["error"] < 1e-6
    rows = found["rows"]
    assert [row["executions"] for row in rows] == [1] * 9
    assert sum(row["compiles"] for row in rows[:-1]) <= 2
    assert [row["from_device"] for row in rows] == [0] * 8 + [1]
    assert "devices=[4,1]" in found["batch"], "split by rows over all axes"
    assert "devices=" not in found["scalar"]
    assert ("devices=" in found["weight"]) == ("fsdp" in mesh)
    assert ("devices=" in found["moment"]) == ("fsdp" in mesh)


def test_devices_is_short_for_a_mesh():
    found = fresh(on_mesh, None, [ROWS] * 3, 4, CPU_NUM_DEVICES="4")
    assert "devices=[4,1]" in found["batch"]
    assert found["error"] < 1e-6


def pod() -> dict[str, Any]:
    """Compile and run for 64 devices; count the collectives of a warm step before it is launched."""
    import torch_xla

    texts: list[str] = []

    class Dump(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            if batch_idx == 3:
                texts.append(torch_xla._XLAC._get_xla_tensors_hlo(list(self.parameters())))

    module, count = Dump(), Count()
    quiet = {"max_epochs": 1, "enable_progress_bar": False, "callbacks": count}
    Trainer("tpu", backend_options={"mesh": {"data": 16, "fsdp": 4}}, **quiet).fit(module, data([ROWS] * 6))
    kinds = re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(", texts[0])
    return {"rows": count.rows, "kinds": {kind: kinds.count(kind) for kind in set(kinds)}}


def test_a_pod_of_64_compiles_once_and_communicates():
    found = fresh(pod, CPU_NUM_DEVICES="64", XLA_DUMP_POST_OPTIMIZATIONS="1")
    assert sum(row["compiles"] for row in found["rows"]) <= 2 + 1, "two of training, one to count the collectives"
    assert [row["executions"] for row in found["rows"]] == [1] * 6
    assert 1 <= found["kinds"]["all-reduce"] <= 20
    assert found["kinds"].get("all-gather", 0) <= 20


# ---------------------------------------------------------------- bad input


def refused(mesh: Any, sizes: list[int], batch: str = "tensors") -> str:
    try:
        if batch == "objects":
            Trainer("tpu", backend_options={"mesh": mesh}, max_epochs=1).fit(Net(), [["a", "b"]])
        fit(sizes, backend_options={"mesh": mesh})
    except errors.ConfigurationError as error:
        return str(error)
    return "accepted"


def all_refusals() -> dict[str, str]:
    return {
        "batch": refused({"data": 4}, [6, 6]),
        "devices": refused({"data": 3}, [6]),
        "objects": refused({"data": 4}, [8], "objects"),
        "axis": refused({"model": 4}, [8]),
        "size": refused({"data": 0}, [8]),
    }


def test_meshes_that_do_not_fit_are_refused_in_words():
    found = fresh(all_refusals, CPU_NUM_DEVICES="4")
    for name, words in {
        "batch": ["Expected a batch size that the mesh {'data': 4} divides", "Received: 6", "batch_size=8"],
        "devices": ["Expected a mesh of the 4 devices", "needs 3", "{'data': 4}"],
        "objects": ["Expected a batch of tensors", "collate_fn"],
        "axis": ["'data'", "'fsdp'", "model"],
        "size": ["positive", "Fix:"],
    }.items():
        assert all(word in found[name] for word in words), found[name]


def late_mesh() -> None:
    fit([ROWS])
    fit([ROWS], backend_options={"mesh": {"data": 4}})


def test_a_mesh_after_the_devices_were_used_is_refused():
    done = fresh_process(late_mesh, CPU_NUM_DEVICES="4")
    assert "BackendUnavailableError: Expected a mesh before any device is used" in done.stderr
