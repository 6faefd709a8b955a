"""The table of combinations that cannot work, checked before the first batch.

A rule looks at one `Situation` and says what it found, or None. Rules that only one backend knows
live on that backend (`Backend.rules`); the table users see is the union.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch.optim import LBFGS, Optimizer

from xtrain.contract import Backend, Rule, Situation
from xtrain.errors import UnsupportedCombinationError


def reevaluates_closure(optimizer: Optimizer) -> bool:
    """Return whether one ``step`` evaluates its closure several times.

    True for `torch.optim.LBFGS` and for classes that say ``reevaluates_closure = True``.
    """
    return isinstance(optimizer, LBFGS) or bool(getattr(optimizer, "reevaluates_closure", False))


def _reevaluating(s: Situation) -> str | None:
    names = [f"optimizer {i} ({type(o).__name__})" for i, o in enumerate(s.optimizers) if reevaluates_closure(o)]
    return ", ".join(names) or None


def _shared(s: Situation) -> str | None:
    owners = Counter(
        id(p) for o in s.optimizers for p in {id(p): p for g in o.param_groups for p in g["params"]}.values()
    )
    count = sum(1 for n in owners.values() if n > 1)
    return f"{count} parameter(s) held by more than one optimizer" if count else None


def _clip_value(s: Situation) -> str | None:
    return "gradient_clip_algorithm='value'" if s.gradient_clip_algorithm == "value" else None


def _manual_flags(s: Situation) -> str | None:
    given = [f"gradient_clip_val={s.gradient_clip_val}"] if s.gradient_clip_val is not None else []
    if s.accumulate_grad_batches != 1:
        given.append(f"accumulate_grad_batches={s.accumulate_grad_batches}")
    return ", ".join(given) or None


def _no_compiler(s: Situation) -> str | None:
    if s.compile is None:
        return None
    from xtrain.compiled.building import missing_compiler

    return missing_compiler(s.backend.device, _whole_step(s))


def _whole_step(s: Situation) -> bool:
    """Return whether whole steps are to be compiled."""
    return s.compile in ("step", "require")


_COMPILE = "docs/compile.md"
_SCALED_TWICE = "Its gradients would be unscaled once per optimizer that holds it."
_LBFGS_DOCS = "torch.optim.LBFGS"

RULES: tuple[Rule, ...] = (
    Rule(
        "precision",
        "a precision outside the backend's row of the matrix",
        "The device has no such arithmetic, or a loss scale has no meaning there.",
        "Trainer(precision='bf16-mixed'), or another one of the row",
        "docs/backends.md",
        lambda s: s.precision.name if s.precision.name not in s.backend.capabilities.precisions else None,
    ),
    Rule(
        "lbfgs-scaling",
        "LBFGS, or any optimizer that re-evaluates its closure, with 16-mixed",
        "The line search compares losses and gradients of several evaluations; an overflow in one cannot be skipped.",
        "Trainer(precision='bf16-mixed') or '32-true'",
        _LBFGS_DOCS,
        lambda s: _reevaluating(s) if s.precision.loss_scaling else None,
    ),
    Rule(
        "lbfgs-backend",
        "LBFGS, or any optimizer that re-evaluates its closure, where a step cannot run a closure (DeepSpeed)",
        "The engine updates its own copy of the parameters, once per step.",
        "torch.optim.Adam(...), or a backend that keeps the parameters whole",
        _LBFGS_DOCS,
        lambda s: None if s.backend.capabilities.reevaluating_closures else _reevaluating(s),
    ),
    Rule(
        "lbfgs-accumulation",
        "LBFGS with accumulate_grad_batches above 1 in automatic optimization",
        "Its closure sees one batch only, so the line search would follow another function than the gradient.",
        "Trainer(accumulate_grad_batches=1), or a closure over all batches in manual optimization",
        _LBFGS_DOCS,
        lambda s: _reevaluating(s) if s.automatic and s.accumulate_grad_batches > 1 else None,
    ),
    Rule(
        "shared-scaling",
        "a parameter held by two optimizers, with 16-mixed",
        _SCALED_TWICE,
        "give the parameter to one optimizer, or use Trainer(precision='bf16-mixed')",
        "torch.amp.GradScaler.unscale_",
        lambda s: _shared(s) if s.precision.loss_scaling else None,
    ),
    Rule(
        "shared-backend",
        "a parameter held by two optimizers, on a backend that partitions optimizers (DeepSpeed)",
        "Each engine keeps a master copy of its parameters; two copies would drift apart.",
        "give the parameter to one optimizer",
        "deepspeed.initialize",
        lambda s: None if s.backend.capabilities.shared_parameters else _shared(s),
    ),
    Rule(
        "value-clipping",
        "gradient_clip_algorithm='value' on a backend that says it has no whole gradients",
        "No process holds a whole gradient when it is clipped.",
        "Trainer(gradient_clip_algorithm='norm')",
        "xtrain.contract.Capabilities.value_clipping",
        lambda s: None if s.backend.capabilities.value_clipping else _clip_value(s),
    ),
    Rule(
        "manual-flags",
        "gradient_clip_val or accumulate_grad_batches with manual optimization",
        "The training step owns clipping and accumulation; the flag would do nothing.",
        "self.clip_gradients(opt, gradient_clip_val=...) in training_step",
        "docs/guide.md",
        lambda s: None if s.automatic else _manual_flags(s),
    ),
    Rule(
        "automatic-several",
        "LBFGS beside another optimizer with automatic optimization",
        "All of them step on the gradients of one backward, and LBFGS asks for more.",
        "self.automatic_optimization = False in __init__",
        "docs/guide.md",
        lambda s: _reevaluating(s) if s.automatic and len(s.optimizers) > 1 else None,
    ),
    Rule(
        "scaler-kwargs",
        "scaler_kwargs with a precision other than 16-mixed",
        "Only fp16 autocast scales the loss; the options would do nothing.",
        "Trainer(precision='16-mixed', scaler_kwargs={...})",
        "torch.amp.GradScaler",
        lambda s: f"precision {s.precision.name}" if s.scaler_kwargs and not s.precision.loss_scaling else None,
    ),
    Rule(
        "fused",
        "fused=True on a backend without fused optimizers",
        "torch has none for the device, or an engine steps its own copy of the parameters.",
        "Trainer(fused=False)",
        "xtrain.contract.Capabilities.fused_optimizers",
        lambda s: "fused=True" if s.fused and not s.backend.capabilities.fused_optimizers else None,
    ),
    Rule(
        "compile-backend",
        "compile on a backend that compiles by itself, or keeps parameters in parts",
        "torch's compiler would see something else than the operations that train.",
        "Trainer(compile=None)",
        _COMPILE,
        lambda s: f"compile={s.compile!r}" if s.compile and not s.backend.capabilities.compiled_steps else None,
    ),
    Rule(
        "compile-compiler",
        "compile on a machine without a compiler",
        "Compiled operations are C++ or Triton code, made on this machine.",
        "install what is missing, or Trainer(compile=None)",
        _COMPILE,
        _no_compiler,
    ),
    Rule(
        "compile-processes",
        "compile='step' with several processes",
        "The ranks agree on the host, in the middle of the step, on which gradients there are.",
        "Trainer(compile='networks')",
        _COMPILE,
        lambda s: (
            f"{s.backend.collectives.world_size} processes"
            if _whole_step(s) and s.backend.collectives.world_size > 1
            else None
        ),
    ),
    Rule(
        "compile-lbfgs",
        "compile='step' with LBFGS, or any optimizer that re-evaluates its closure",
        "How often it does is decided from values of the loss.",
        "Trainer(compile='networks')",
        _COMPILE,
        lambda s: _reevaluating(s) if _whole_step(s) else None,
    ),
    Rule(
        "devices",
        "devices above 1 on a backend of one process",
        "The other devices would idle.",
        "Trainer(devices=1)",
        "docs/launch.md",
        lambda s: f"devices={s.devices}" if (s.devices or 1) > 1 and not s.backend.capabilities.multi_process else None,
    ),
)


def all_rules(backends: Iterable[type[Backend]]) -> list[Rule]:
    """Return the rules of the core and of `backends`, each once, in the order of the table."""
    return list(dict.fromkeys([*RULES, *(rule for backend in backends for rule in backend.rules)]))


def check_rules(situation: Situation) -> None:
    """Check all rules at once.

    Raises:
        UnsupportedCombinationError: with every violation: what was found, the reason and the fix.
    """
    violations = []
    for rule in all_rules([type(situation.backend)]):
        found = rule.check(situation)
        if found is not None:
            where = f"backend '{situation.backend.name}', precision '{situation.precision.name}'"
            lines = (f"[{rule.id}] {rule.combination}. Received: {found}; {where}.", rule.reason, f"Fix:  {rule.fix}")
            violations.append("\n     ".join(lines))
    if violations:
        raise UnsupportedCombinationError(violations)
