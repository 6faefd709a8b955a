"""Lightning's spellings of a backend, and arguments of the Trainer that mean nothing."""

from __future__ import annotations

import pytest
from small import says, trainer

from xtrain import ConfigurationError, Trainer
from xtrain.compat.backends import read_backend
from xtrain.registry import make_backend


@pytest.mark.parametrize(
    ("backend", "accelerator", "strategy", "expected"),
    [
        (None, None, None, ("auto", {})),
        ("cuda", None, None, ("cuda", {})),
        (None, "auto", "auto", ("auto", {})),
        (None, "cpu", None, ("cpu", {})),
        (None, "gpu", None, ("cuda", {})),
        (None, "cuda", "ddp", ("cuda", {})),
        (None, "tpu", None, ("tpu", {})),
        (None, "gpu", "ddp_find_unused_parameters_true", ("cuda", {})),
        (None, "tpu", "xla", ("tpu", {})),
        (None, None, "single_tpu", ("tpu", {})),
        (None, "gpu", "deepspeed", ("deepspeed", {})),
        (None, "gpu", "deepspeed_stage_1", ("deepspeed", {"stage": 1})),
        (None, "gpu", "deepspeed_stage_3", ("deepspeed", {"stage": 3})),
        (None, "gpu", "deepspeed_stage_2_offload", ("deepspeed", {"stage": 2, "offload_optimizer": "cpu"})),
        ("deepspeed", None, "deepspeed_stage_2", ("deepspeed", {"stage": 2})),
        ("cpu", "cpu", "ddp", ("cpu", {})),
        ("tpu", "tpu", "xla", ("tpu", {})),
    ],
)
def test_spelling(backend, accelerator, strategy, expected):
    assert read_backend(backend, accelerator, strategy) == expected


def test_options_go_together_with_those_of_a_strategy():
    given = {"stage": 3, "overlap_comm": True}
    assert read_backend(None, None, "deepspeed_stage_3", given) == ("deepspeed", given)


def test_default_backend_of_a_trainer():
    assert Trainer().backend.name == "cpu"
    assert Trainer(accelerator="cpu", devices=1, strategy="auto").backend.name == "cpu"


def test_instance_agrees_with_its_own_name():
    backend = make_backend("cpu", None)
    assert Trainer(backend, accelerator="cpu").backend is backend


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"backend": "cpu", "accelerator": "gpu"}, ("accelerator='gpu'", "backend='cpu'", "Trainer(backend='cuda')")),
        ({"backend": "cpu", "strategy": "xla"}, ("strategy='xla'", "backend='cpu'", "Trainer(backend='tpu')")),
        ({"backend": make_backend("cpu", None), "accelerator": "tpu"}, ("accelerator='tpu'", "backend='cpu'")),
        ({"accelerator": "ipu"}, ("accelerator out of", "'cuda'", "'ipu'")),
        (
            {"strategy": "deepspeed_stage_3", "backend_options": {"stage": 1}},
            ("strategy='deepspeed_stage_3'", "agree on stage (3)", "stage=1", "backend='deepspeed' in place of"),
        ),
        ({"strategy": "fsdp1"}, ("strategy out of", "'deepspeed_stage_2'", "'fsdp'", "'fsdp1'")),
    ],
)
def test_disagreement_or_unknown_spelling(options, parts):
    with pytest.raises(ConfigurationError) as caught:
        trainer(**options)
    says(caught.value, *parts)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("max_epochs", -2),
        ("max_epochs", 1.5),
        ("max_epochs", "3"),
        ("max_epochs", True),
        ("max_steps", -2),
        ("max_steps", 2.0),
        ("devices", 0),
        ("devices", 1.0),
        ("fast_dev_run", -1),
        ("num_sanity_val_steps", -2),
        ("check_val_every_n_epoch", 0),
        ("accumulate_grad_batches", 0),
        ("accumulate_grad_batches", {0: 2}),
        ("log_every_n_steps", -1),
        ("limit_train_batches", -1),
        ("limit_train_batches", 1.5),
        ("limit_val_batches", -0.5),
        ("limit_test_batches", float("nan")),
        ("limit_predict_batches", "all"),
        ("gradient_clip_algorithm", "l2"),
        ("nonfinite_loss", "raise"),
        ("nonfinite_loss", None),
        ("gradient_clip_val", -1.0),
        ("gradient_clip_val", float("nan")),
        ("gradient_clip_val", "1"),
    ],
)
def test_argument_that_means_nothing(flag, value):
    with pytest.raises(ConfigurationError) as caught:
        trainer(**{flag: value})
    says(caught.value, flag, repr(value))


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("max_epochs", None),
        ("max_steps", -1),
        ("devices", "auto"),
        ("num_sanity_val_steps", -1),
        ("check_val_every_n_epoch", 3),
        ("limit_train_batches", 0.0),
        ("limit_val_batches", None),
        ("gradient_clip_val", float("inf")),
        ("precision", None),
    ],
)
def test_argument_at_the_edge(flag, value):
    trainer(**{flag: value})


@pytest.mark.parametrize("steps", [0, -1, 1.5, "3", True])
def test_steps_of_a_call(steps):
    with pytest.raises(ConfigurationError) as caught:
        trainer().fit(None, steps=steps)
    says(caught.value, "steps", repr(steps))


@pytest.mark.parametrize("callbacks", [3, [3], ["early"], [object()]])
def test_callbacks_that_are_none(callbacks):
    with pytest.raises(ConfigurationError) as caught:
        trainer(callbacks=callbacks)
    says(caught.value, "xtrain.Callback")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("nvidia", "Trainer(backend='cuda')"),
        ("ddp", "Trainer(backend='cuda', devices=2)"),
        ("zero3", "Trainer(backend='deepspeed', backend_options={'stage': 3})"),
        ("fsdp2", "Trainer(backend='fsdp')"),
        ("cud", "Trainer(backend='cuda')"),
    ],
)
def test_a_name_is_answered_by_what_it_means_before_its_letters(name, fix):
    with pytest.raises(ConfigurationError) as caught:
        Trainer(backend=name)
    says(caught.value, f"Fix:  {fix}")


def test_a_backend_may_be_called_by_its_hardware():
    assert read_backend("gpu", None, None) == ("cuda", {})
    assert Trainer(backend="GPU").backend.name == "cuda"
