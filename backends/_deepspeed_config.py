from __future__ import annotations
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

@dataclass
class Source:
    stage: Any = None
    offload_optimizer: Any = None
    offload_param: Any = None

def read_config(config: Any, given: Source) -> dict[str, Any]:
    result = copy.deepcopy(dict(config or {}))
    zero = result.setdefault("zero_optimization", {})
    if given.stage is not None:
        zero["stage"] = given.stage
    zero.setdefault("stage", 2)
    for name in ("offload_optimizer", "offload_param"):
        value = getattr(given, name)
        if value is not None:
            zero[name] = {"device": value} if isinstance(value, str) else dict(value)
    return result

def engine_config(config: dict[str, Any], parameters: Iterable[Any]) -> dict[str, Any]:
    """Return the configuration of one engine."""
    result = copy.deepcopy(config)
    count = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    result |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    result.setdefault("steps_per_print", 2**31 - 1)
    zero = result["zero_optimization"]
    # DeepSpeed allocates the whole bucket, 2 GB by default, for each engine.
    zero["reduce_bucket_size"] = max(8, min(int(zero.get("reduce_bucket_size", 5e8)), count))
    zero.setdefault("overlap_comm", False)
    return result
