"""What DeepSpeed refuses beyond the common table."""

from __future__ import annotations

from torch.optim import Adafactor, Adagrad, Muon, SparseAdam

from xtrain.contract import Rule, Situation


def _stage(situation: Situation) -> int:
    config = getattr(situation.backend, "config", {})
    return int(config["zero_optimization"]["stage"])


def _adagrad(situation: Situation) -> str | None:
    found = [i for i, o in enumerate(situation.optimizers) if isinstance(o, Adagrad)]
    return f"optimizer {found[0]} (Adagrad), stage {_stage(situation)}" if found and _stage(situation) else None


def _flat(situation: Situation) -> str | None:
    if not _stage(situation):
        return None
    for index, optimizer in enumerate(situation.optimizers):
        if isinstance(optimizer, Adafactor | Muon | SparseAdam):
            return f"optimizer {index} ({type(optimizer).__name__}), stage {_stage(situation)}"
    return None


def _frozen(situation: Situation) -> str | None:
    for index, optimizer in enumerate(situation.optimizers):
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            return f"optimizer {index} ({type(optimizer).__name__}) holds frozen parameters only"
    return None


def _stateful(situation: Situation) -> str | None:
    found = [i for i, o in enumerate(situation.optimizers) if o.state]
    return f"optimizer {found[0]} has state, stage {_stage(situation)}" if found and _stage(situation) else None


RULES = (
    Rule(
        "deepspeed-adagrad",
        "torch.optim.Adagrad with ZeRO stage 1 or above",
        "DeepSpeed replaces it by a new optimizer, which schedulers and self.optimizers() do not know.",
        "torch.optim.Adam(...), or DeepSpeed(stage=0)",
        "deepspeed.runtime.zero",
        _adagrad,
    ),
    Rule(
        "deepspeed-flat",
        "torch.optim.Adafactor, Muon or SparseAdam with ZeRO stage 1 or above",
        "DeepSpeed steps on flat, dense slices; these look at a parameter's shape or at sparse gradients.",
        "torch.optim.AdamW(...), or DeepSpeed(stage=0)",
        "deepspeed.runtime.zero",
        _flat,
    ),
    Rule(
        "deepspeed-frozen",
        "an optimizer without any parameter that requires a gradient",
        "An engine over nothing cannot be made.",
        "parameter.requires_grad_(True) before the optimizer is made, or leave that optimizer out",
        "deepspeed.initialize",
        _frozen,
    ),
    Rule(
        "deepspeed-state",
        "an optimizer that already has state (moments, step counts) with ZeRO stage 1 or above",
        "DeepSpeed steps on its own shards, for which the state is not found: it would start from nothing.",
        "a fresh optimizer in configure_optimizers, or DeepSpeed(stage=0)",
        "deepspeed.runtime.zero",
        _stateful,
    ),
)
