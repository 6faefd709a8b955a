"""What FSDP2 refuses beyond the common table."""

from __future__ import annotations

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer, SparseAdam

from xtrain.contract import Rule, Situation


def _early(situation: Situation) -> str | None:
    sharded = getattr(situation.backend, "_sharded", None)
    for index, optimizer in enumerate(situation.optimizers):
        for group in optimizer.param_groups:
            if sharded is not None and any(sharded.knew(p) for p in group["params"]):
                return f"optimizer {index} ({type(optimizer).__name__})"
    return None


def mixes(optimizer: Optimizer) -> bool:
    """Return whether `optimizer` holds parameters in shards and whole ones."""
    return len({isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"]}) > 1


def _together(situation: Situation) -> str | None:
    for index, optimizer in enumerate(situation.optimizers):
        if any(group.get("fused") or group.get("foreach") for group in optimizer.param_groups) and mixes(optimizer):
            return f"optimizer {index} ({type(optimizer).__name__})"
    return None


def _sparse(situation: Situation) -> str | None:
    found = [i for i, o in enumerate(situation.optimizers) if isinstance(o, SparseAdam)]
    return f"optimizer {found[0]} (SparseAdam)" if found else None


RULES = (
    Rule(
        "fsdp-early",
        "an optimizer of parameters from before they were sharded (fsdp)",
        "Sharding replaces parameters; the optimizer would train tensors that nothing uses.",
        "def configure_optimizers(self): return torch.optim.Adam(self.net.parameters())",
        "torch.distributed.fsdp.fully_shard",
        _early,
    ),
    Rule(
        "fsdp-together",
        "fused=True or foreach=True over parameters in shards and whole ones together (fsdp)",
        "It computes with all of them at once, which torch does not do for the two kinds.",
        "leave fused and foreach out, or an optimizer for the networks and one for what lies on the module itself",
        "torch.distributed.tensor",
        _together,
    ),
    Rule(
        "fsdp-sparse",
        "torch.optim.SparseAdam (fsdp)",
        "Gradients are reduced into dense shards, which it does not take.",
        "torch.optim.Adam(...)",
        "torch.distributed.fsdp.fully_shard",
        _sparse,
    ),
)
