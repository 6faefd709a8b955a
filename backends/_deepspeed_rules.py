"""What DeepSpeed refuses beyond the common table."""

from __future__ import annotations

from torch.optim import Adagrad

from xtrain.rules import Rule, Situation


def _stage(situation: Situation) -> int:
    config = getattr(situation.backend, "config", {})
    return int(config["zero_optimization"]["stage"])


def _adagrad(situation: Situation) -> str | None:
    found = [i for i, o in enumerate(situation.optimizers) if isinstance(o, Adagrad)]
    return f"optimizer {found[0]} (Adagrad), stage {_stage(situation)}" if found and _stage(situation) else None


def _frozen(situation: Situation) -> str | None:
    for index, optimizer in enumerate(situation.optimizers):
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            return f"optimizer {index} ({type(optimizer).__name__}) holds frozen parameters only"
    return None


def _accumulation_dtype(situation: Situation) -> str | None:
    config = getattr(situation.backend, "config", {})
    dtype = config.get("data_types", {}).get("grad_accum_dtype")
    if situation.precision.parameter_dtype is None or dtype in (None, "bf16") or _stage(situation) != 1:
        return None
    return f"grad_accum_dtype={dtype!r}, stage 1"


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
        "deepspeed-frozen",
        "an optimizer without any parameter that requires a gradient",
        "An engine over nothing cannot be made.",
        "parameter.requires_grad_(True) before the optimizer is made, or leave that optimizer out",
        "deepspeed.initialize",
        _frozen,
    ),
    Rule(
        "deepspeed-accumulation",
        "bf16-true on stage 1 with another data_types.grad_accum_dtype than bf16",
        "DeepSpeed's optimizer for that keeps gradients where they can be neither accumulated nor dropped freely.",
        "DeepSpeed(stage=2), or Trainer(precision='bf16-mixed'), which accumulates in fp32",
        "https://www.deepspeed.ai/docs/config-json/#data-type-options",
        _accumulation_dtype,
    ),
)
