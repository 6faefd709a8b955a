"""DeepSpeed's configuration: where it comes from, what of it xtrain owns, and what one engine gets."""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xtrain.errors import ConfigurationError, explain
from xtrain.precision import Precision

Config = dict[str, Any]

_BUCKET = 2**23  # elements, 32 MB in fp32: as large as pays for a reduction
_OFFLOADS = ("offload_optimizer", "offload_param")
_DEVICES = ("cpu", "none")

# What xtrain or the Trainer decides: the values a file may repeat, and who decides.
_OWNED: dict[str, tuple[tuple[Any, ...], str]] = {
    "gradient_accumulation_steps": ((1,), "Trainer(accumulate_grad_batches=...), or the training step"),
    "gradient_clipping": (
        (0, 0.0),
        "self.clip_gradients(opt, gradient_clip_val=...), or Trainer(gradient_clip_val=...)",
    ),
    "train_micro_batch_size_per_gpu": ((1,), "DataLoader(..., batch_size=...)"),
    "train_batch_size": ((), "DataLoader(..., batch_size=...)"),
    "managed_gradient_accumulation": ((True,), "opt.step(), which ends every accumulation"),
    "gradient_allreduce_op": (("mean",), "the average over processes, as on every backend"),
    "optimizer": ((), "configure_optimizers: return torch.optim.AdamW(self.parameters(), lr=...)"),
    "scheduler": ((), "configure_optimizers: return [opt], [torch.optim.lr_scheduler.StepLR(opt, 10)]"),
    "fp16": (({"enabled": False},), "Trainer(precision='16-mixed')"),
    "torch_autocast": (({"enabled": False},), "Trainer(precision='bf16-mixed')"),
    "amp": (({"enabled": False},), "Trainer(precision='16-mixed')"),
}

# What acts in parts of DeepSpeed that a training step of xtrain never comes through.
_BYPASSED = {
    "its layers are called directly, not through an engine": (
        "autotuning compile expert_parallel flops_profiler hybrid_engine tensor_parallel weight_quantization"
    ),
    "batches come from your own loaders": "curriculum_learning data_efficiency dataloader_drop_last",
    "xtrain writes no checkpoints of DeepSpeed's": "checkpoint datastates_ckpt nebula use_node_local_storage",
    "it steps on gradients of its own choice": "zenflow",
    "DeepSpeed has removed it": "compression_training elasticity sparse_attention sparse_gradients",
}
_WHY_BYPASSED = {key: reason for reason, keys in _BYPASSED.items() for key in keys.split()}

_KEYS = """
activation_checkpointing aio bf16 bfloat16 comet comms_logger communication_data_type csv_monitor data_types
disable_allgather disable_python_gc dump_state gradient_predivide_factor log_level memory_breakdown prescale_gradients
python_gc seq_parallel_communication_data_type steps_per_print tensorboard timers wandb wall_clock_breakdown
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
"""
_PASSED_ON = frozenset(_KEYS.split())


def read_config(
    given: Mapping[str, Any], config: str | os.PathLike[str] | Mapping[str, Any] | None, environ: Mapping[str, str]
) -> Config:
    """Merge the sources of settings into one DeepSpeed configuration.

    Args:
        given: ``stage``, ``offload_optimizer`` and ``offload_param`` as arguments; None is not given.
        config: a dict or the path of a JSON file.
        environ: the environment, in which ``accelerate launch`` leaves its flags.

    Raises:
        ConfigurationError: for a file that cannot be read, an unknown key, a setting that is not
            DeepSpeed's to make, or two sources that disagree; both are named.
    """
    launched = options_from_environment(environ)
    sources = [("the arguments of DeepSpeed(...)", dict(given))]
    if config is not None and launched.get("config") not in (None, config):
        raise _disagreement("the configuration", "config", str(config), "accelerate launch", launched["config"])
    result, where = _load(config if config is not None else launched.pop("config", None))
    launched.pop("config", None)
    result = dict(_without_auto(result))
    _check_keys(result, where)
    zero = result.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigurationError(
            explain(f"a dict as zero_optimization in {where}", repr(zero), '"zero_optimization": {"stage": 2}')
        )
    sources += [(where, {name: zero[name] for name in ("stage", *_OFFLOADS) if name in zero})]
    sources += [("accelerate launch", launched)]
    zero.update(_agreed(sources))
    _check_bypassed("zenflow", zero.get("zenflow"), where)
    _check_zero(zero)
    return result


def options_from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of `DeepSpeed` that ``accelerate launch --use_deepspeed`` left in `environ`.

    Raises:
        ConfigurationError: if the launcher was told to accumulate or to clip, which xtrain does.
    """
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return {}
    for flag, variable in (
        ("gradient_accumulation_steps", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"),
        ("gradient_clipping", "ACCELERATE_GRADIENT_CLIPPING"),
    ):
        value = environ.get(variable, "none")
        if value not in ("none", "auto") and float(value) not in _OWNED[flag][0]:
            raise _owned(flag, value, f"accelerate launch --{flag}")
    found: dict[str, Any] = {"config": environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")}
    found["stage"] = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "none")
    for name in _OFFLOADS:
        found[name] = environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}_DEVICE", "none")
    options = {name: value for name, value in found.items() if value.lower() != "none"}
    if "stage" in options:
        options["stage"] = int(options["stage"])
    return options


def check_precision(config: Config, precision: Precision) -> None:
    """Refuse a configuration whose ``bf16`` contradicts the Trainer's precision.

    Raises:
        ConfigurationError: naming both.
    """
    section = config.get("bf16", config.get("bfloat16", {}))
    enabled = section.get("enabled") if isinstance(section, Mapping) else section
    if enabled is not None and enabled is not (precision.name == "bf16-true"):
        name = "bf16-true" if enabled else "32-true"
        received = f"bf16.enabled={enabled} in the configuration, Trainer(precision={precision.name!r})"
        raise ConfigurationError(
            explain("the configuration and the Trainer to agree on bf16", received, f"Trainer(precision={name!r})")
        )


def engine_config(config: Config, parameters: Iterable[Any], precision: Precision) -> Config:
    """Return the configuration of one engine.

    Args:
        config: as `read_config` returned it.
        parameters: what the engine is made for.
        precision: the Trainer's.
    """
    defaults: Config = {
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    owned = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    result = defaults | copy.deepcopy(config) | owned
    if precision.parameter_dtype is not None:
        result["bf16"] = {**result.get("bf16", {}), "enabled": True}
    zero = result["zero_optimization"]
    count = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    # DeepSpeed allocates the whole bucket for each engine: 2 GB by default, however small the model.
    zero["reduce_bucket_size"] = max(8, min(int(zero.get("reduce_bucket_size", _BUCKET)), count))
    if zero["stage"] in (1, 2) and zero.get("offload_optimizer", {}).get("device", "none") == "none":
        zero.setdefault("compute_grad_norm", False)  # xtrain computes it when it is asked to clip
    zero.setdefault("overlap_comm", False)
    return result


def _load(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> tuple[Config, str]:
    """Return the configuration and what to call it in messages."""
    if config is None:
        return {}, "the configuration"
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config)), "config={...}"
    fix = "DeepSpeed(config='ds_config.json'), a file that holds one JSON object"
    try:
        loaded = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigurationError(explain("a readable JSON file as config", f"{config} ({error})", fix)) from error
    if not isinstance(loaded, dict):
        raise ConfigurationError(explain("a JSON object as config", f"{type(loaded).__name__} in {config}", fix))
    return loaded, str(config)


def _without_auto(config: Any) -> Any:
    """Leave out what is ``"auto"``: DeepSpeed's default or xtrain's value takes its place."""
    if not isinstance(config, dict):
        return config
    return {key: _without_auto(value) for key, value in config.items() if value != "auto"}


def _check_keys(config: Config, where: str) -> None:
    for key, value in config.items():
        if key in _OWNED:
            allowed = _OWNED[key][0]
            if value not in allowed and not (allowed and _is_off(value)):
                raise _owned(key, value, where)
        elif key in _WHY_BYPASSED:
            _check_bypassed(key, value, where)
        elif key not in _PASSED_ON:
            closest = difflib.get_close_matches(key, [*_PASSED_ON, *_OWNED], n=1)
            fix = f'"{closest[0]}": ...' if closest else "https://www.deepspeed.ai/docs/config-json lists the keys"
            raise ConfigurationError(explain(f"keys that DeepSpeed knows in {where}", repr(key), fix))
    if config.get("data_types", {}).get("grad_accum_dtype") is not None:
        raise ConfigurationError(
            explain(
                "gradients to accumulate in the parameters' dtype, where xtrain keeps them",
                f"data_types.grad_accum_dtype={config['data_types']['grad_accum_dtype']!r} in {where}",
                "leave it out; Trainer(precision='bf16-mixed') accumulates in fp32",
            )
        )


def _check_bypassed(key: str, value: Any, where: str) -> None:
    if value and not _is_off(value):
        expected = f"{key} to be left out, since {_WHY_BYPASSED[key]}"
        raise ConfigurationError(explain(expected, f"{key}={value!r} in {where}", f"remove {key!r} from {where}"))


def _is_off(section: Any) -> bool:
    return isinstance(section, dict) and section.get("enabled") is False


def _agreed(sources: list[tuple[str, dict[str, Any]]]) -> Config:
    """Return stage and offloading, on which all sources that name them must agree."""
    agreed: Config = {}
    for name in ("stage", *_OFFLOADS):
        named = [(source, _plain(name, values[name])) for source, values in sources if values.get(name) is not None]
        for source, value in named[1:]:
            if value != named[0][1]:
                raise _disagreement(name, name, named[0][1], source, value, named[0][0])
        if named:
            agreed[name] = named[0][1]
    return {"stage": 2} | agreed


def _plain(name: str, value: Any) -> Any:
    """Return an offload given by its device as DeepSpeed's dict."""
    return {"device": value} if name in _OFFLOADS and isinstance(value, str) else copy.deepcopy(value)


def _check_zero(zero: Config) -> None:
    stage = zero["stage"]
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigurationError(explain("a ZeRO stage out of 0, 1, 2, 3", repr(stage), "DeepSpeed(stage=2)"))
    for name, lowest in zip(_OFFLOADS, (1, 3), strict=True):
        offload = zero.get(name)
        if offload is None:
            continue
        device = offload.get("device") if isinstance(offload, Mapping) else offload
        if device not in _DEVICES:
            fix = f"DeepSpeed(stage={lowest}, {name}='cpu')"
            raise ConfigurationError(
                explain(
                    f"{name} to be 'cpu', or a dict with 'device': 'cpu' (copies on NVMe would miss what you write)",
                    repr(offload),
                    fix,
                )
            )
        if device != "none" and stage < lowest:
            fix = f"DeepSpeed(stage={lowest}, {name}={device!r})"
            raise ConfigurationError(explain(f"{name} with stage {lowest} or above", f"stage {stage}", fix))


def _owned(key: str, value: Any, where: str) -> ConfigurationError:
    owner = _OWNED[key][1]
    return ConfigurationError(
        explain(f"{key} to be left to xtrain: {owner}", f"{key}={value!r} in {where}", f"remove {key!r} from {where}")
    )


def _disagreement(
    what: str, name: str, one: Any, other: str, value: Any, source: str = "the arguments of DeepSpeed(...)"
) -> ConfigurationError:
    received = f"{name}={one!r} in {source}, {name}={value!r} in {other}"
    return ConfigurationError(explain(f"one {what} from all sources", received, f"give {name} in one place"))
