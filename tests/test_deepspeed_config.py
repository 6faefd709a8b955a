"""Where DeepSpeed's settings come from, and which are refused; needs no DeepSpeed."""

import json
import sys
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from fresh import fresh
from small import Small, loader
from xtrain_backends.deepspeed.config import check_precision, engine_config, options_from_environment, read_config

from xtrain import BackendUnavailableError, ConfigurationError, Trainer
from xtrain.cli import main
from xtrain.precision import PRECISIONS

NOTHING = {"stage": None, "offload_optimizer": None, "offload_param": None}
ACCELERATE = {"ACCELERATE_USE_DEEPSPEED": "true"}


def read(config=None, environ=None, **given):
    return read_config({**NOTHING, **given}, config, environ or {})


def refused(says, config=None, environ=None, **given):
    with pytest.raises(ConfigurationError) as caught:
        read(config, environ, **given)
    for part in ("Expected ", "Received: ", "Fix: ", *says):
        assert part in str(caught.value)


def test_stage_comes_from_arguments_file_dict_launcher_or_default(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, "wall_clock_breakdown": True}))
    stage = lambda config: config["zero_optimization"]["stage"]  # noqa: E731
    assert stage(read()) == 2
    assert stage(read(stage=3)) == 3
    assert read(path) == {"zero_optimization": {"stage": 1}, "wall_clock_breakdown": True}
    assert stage(read(path, stage=1)) == 1
    assert stage(read({"zero_optimization": {"stage": "auto"}})) == 2
    assert stage(read(environ=ACCELERATE | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})) == 3
    assert stage(read(environ=ACCELERATE | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})) == 1
    assert stage(read(environ={"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"})) == 2  # not launched by --use_deepspeed


def test_sources_that_disagree_are_both_named():
    refused(["stage=3 in the arguments", "stage=1 in config="], {"zero_optimization": {"stage": 1}}, stage=3)
    flags = ACCELERATE | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}
    refused(["stage=3 in the arguments", "stage=1 in accelerate launch"], environ=flags, stage=3)
    zero = {"stage": 2, "offload_optimizer": {"device": "none"}}
    refused(["offload_optimizer={'device': 'cpu'}"], {"zero_optimization": zero}, offload_optimizer="cpu")
    flags = ACCELERATE | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "other.json"}
    refused(["other.json", "mine.json"], "mine.json", flags)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("gradient_accumulation_steps", 4, "accumulate_grad_batches"),
        ("gradient_clipping", 1.0, "gradient_clip_val"),
        ("train_batch_size", 32, "batch_size"),
        ("train_micro_batch_size_per_gpu", 8, "batch_size"),
        ("managed_gradient_accumulation", False, "opt.step()"),
        ("gradient_allreduce_op", "sum", "average"),
        ("optimizer", {"type": "AdamW"}, "configure_optimizers"),
        ("scheduler", {"type": "WarmupLR"}, "configure_optimizers"),
        ("fp16", {"enabled": True}, "16-mixed"),
        ("torch_autocast", {"enabled": True}, "bf16-mixed"),
        ("data_types", {"grad_accum_dtype": "fp32"}, "bf16-mixed"),
    ],
)
def test_what_xtrain_owns_is_refused(key, value, says):
    refused([key, says], {key: value})
    assert key not in read({key: "auto"})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("flops_profiler", {"enabled": True, "profile_step": 2}, "called directly"),
        ("tensor_parallel", {"autotp_size": 2}, "called directly"),
        ("data_efficiency", {"enabled": True}, "your own loaders"),
        ("checkpoint", {"tag_validation": "Fail"}, "no checkpoints"),
        ("zenflow", {"topk_ratio": 0.1}, "its own choice"),
        ("elasticity", {"enabled": True, "min_gpus": 2}, "has removed it"),
    ],
)
def test_what_would_do_nothing_is_refused(key, value, says):
    refused([f"{key} to be left out", says, f"remove '{key}' from config="], {key: value})
    read({key: "auto"})
    read({key: {"enabled": False}})


def test_zenflow_is_refused_where_it_belongs():
    refused(["zenflow to be left out", "its own choice"], {"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}})


def test_what_repeats_xtrain_is_accepted():
    read({"gradient_accumulation_steps": 1, "gradient_clipping": 0.0, "fp16": {"enabled": False, "loss_scale": 0}})
    read({"train_micro_batch_size_per_gpu": 1, "managed_gradient_accumulation": True})


def test_launcher_flags_that_xtrain_owns_are_refused():
    for name, value in (("GRADIENT_ACCUMULATION_STEPS", "4"), ("GRADIENT_CLIPPING", "1.0")):
        refused([f"--{name.lower()}", value], environ=ACCELERATE | {f"ACCELERATE_{name}": value})
    flags = {"GRADIENT_ACCUMULATION_STEPS": "1", "GRADIENT_CLIPPING": "none", "DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none"}
    assert options_from_environment(ACCELERATE | {f"ACCELERATE_{n}": v for n, v in flags.items()}) == {}


def test_bad_values_say_what_is_right(tmp_path):
    refused(["0, 1, 2, 3", "4"], stage=4)
    refused(["True"], stage=True)
    refused(["zero_optimisation", '"zero_optimization": ...'], {"zero_optimisation": {}})
    refused(["zero_optimization", "3"], {"zero_optimization": 3})
    refused(["'disk'"], offload_optimizer="disk")
    refused(["stage 1 or above", "stage 0"], stage=0, offload_optimizer="cpu")
    refused(["stage 3 or above", "stage 2"], offload_param="cpu")
    refused(["no.json", "No such file"], tmp_path / "no.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{'stage': 2}")
    refused(["broken.json", "line 1"], broken)
    broken.write_text("[1]")
    refused(["JSON object", "list"], broken)
    refused(["JSON", "3"], 3)


def test_unknown_option_of_the_backend_is_refused():
    with pytest.raises(ConfigurationError, match=r"stage"):
        Trainer(backend="deepspeed", backend_options={"stages": 3})


def test_precision_has_one_source():
    check_precision({"bf16": {"enabled": True}}, PRECISIONS["bf16-true"])
    check_precision({"bf16": {"enabled": False}}, PRECISIONS["bf16-mixed"])
    for enabled, name in ((True, "bf16-mixed"), (False, "bf16-true")):
        with pytest.raises(ConfigurationError, match=f"bf16.enabled={enabled}.*{name}"):
            check_precision({"bf16": {"enabled": enabled}}, PRECISIONS[name])


def test_an_engine_gets_a_bucket_of_its_own_size_and_its_precision():
    config = read({"zero_optimization": {"reduce_bucket_size": 50}, "wall_clock_breakdown": True})
    one = engine_config(config, [torch.zeros(5, 4)], PRECISIONS["bf16-true"])
    assert one["zero_optimization"]["reduce_bucket_size"] == 20
    assert one["bf16"] == {"enabled": True}
    assert one["wall_clock_breakdown"] is True
    assert (
        engine_config(config, [torch.zeros(99)], PRECISIONS["32-true"])["zero_optimization"]["reduce_bucket_size"] == 50
    )
    assert config["zero_optimization"]["reduce_bucket_size"] == 50


# ---------------------------------------------------------------- without the package


def fit_without_deepspeed():
    sys.modules["deepspeed"] = None  # as if it were not installed
    module = Small()
    try:
        Trainer(backend="deepspeed", max_epochs=1).fit(module, loader())
    except BackendUnavailableError as error:
        return str(error), module.seen
    return "trained", module.seen


def table_without_deepspeed():
    sys.modules["deepspeed"] = None
    with redirect_stdout(StringIO()) as printed:
        assert main(["backends"]) == 0
    return printed.getvalue()


def test_missing_package_is_told_before_anything_else_happens():
    text, seen = fresh(fit_without_deepspeed)
    assert "'deepspeed' cannot run here: deepspeed is not installed; pip install 'xtrain-torch[deepspeed]'" in text
    assert seen == []


def test_missing_package_is_told_in_the_table():
    row = "deepspeed deepspeed is not installed; pip install 'xtrain-torch[deepspeed]'"
    assert row in [" ".join(line.split()) for line in fresh(table_without_deepspeed).splitlines()]
