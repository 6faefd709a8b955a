"""Bad input: what the message says, when it comes, and that nothing is lost by it."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from small import SCALED, Automatic, Doing, Small, loader, refused, rows, says, trained, trainer
from torch import nn
from xtrain_backends.cpu import CPU

from xtrain import (
    Callback,
    ConfigurationError,
    LightningModule,
    NonFiniteLossError,
    ProtocolError,
    UnknownBackendError,
    UnsupportedCombinationError,
    register_backend,
)

# ---------------------------------------------------------------- before the first batch


def test_unknown_backend():
    with pytest.raises(UnknownBackendError) as caught:
        trainer(backend="cdua")
    says(caught.value, "'cdua'", "'cpu'", "Trainer(backend='cuda')")


def test_all_refused_combinations_are_told_at_once_before_the_first_batch():
    class Unsupported(Small):
        def configure_optimizers(self):
            return [torch.optim.LBFGS(self.parameters()), torch.optim.SGD(self.parameters(), lr=0.1)]

    module = Unsupported()
    with pytest.raises(UnsupportedCombinationError) as caught:
        trained(module=module, precision="16-mixed", gradient_clip_val=1.0)
    found = [re.match(r"\[(.+?)\]", violation)[1] for violation in caught.value.violations]
    assert found == ["lbfgs-scaling", "shared-scaling", "manual-flags"]
    assert "Fix:  Trainer(precision='bf16-mixed')" in str(caught.value)
    assert module.seen == []


@pytest.mark.parametrize("model", [nn.Linear(3, 1), 3, None, Small])
def test_not_a_module(model):
    with pytest.raises(ConfigurationError) as caught:
        trainer().fit(model, loader())
    says(caught.value, "LightningModule", "class Model(xtrain.LightningModule)")


def test_module_that_forgets_super_init():
    class Setting(LightningModule):
        def __init__(self):
            self.automatic_optimization = False

    class Saving(LightningModule):
        def __init__(self, width=3):
            self.save_hyperparameters()

    class Silent(LightningModule):
        def __init__(self): ...

    class Building(LightningModule):
        def __init__(self):
            self.net = torch.nn.Linear(1, 1)

    for kind in (Setting, Saving, Silent, Building):  # a plain attribute alone may come first, as in torch
        with pytest.raises(ConfigurationError) as caught:
            trainer().fit(kind(), loader())
        says(caught.value, "super().__init__()")


@pytest.mark.parametrize("method", ["training_step", "configure_optimizers"])
def test_undefined_method(method):
    class Partial(Small): ...

    setattr(Partial, method, getattr(LightningModule, method))
    with pytest.raises(ConfigurationError) as caught:
        trained(module=Partial())
    says(caught.value, f"Partial.{method}", f"def {method}(self, ")


@pytest.mark.parametrize("empty", [loader(0).dataset, [], iter(())], ids=["sized", "list", "iterator"])
def test_empty_loader(empty):
    module = Small()
    with pytest.raises(ConfigurationError) as caught:
        trained(empty, module)
    says(caught.value, "at least one batch from the training loader", "drop_last=False")
    trained(module=module)
    assert module.seen == [0, 1, 2, 3]


class Miscounted:
    """A loader whose length is an error."""

    def __iter__(self):
        return iter(loader())

    def __len__(self):
        raise RuntimeError("the index is not built")


@pytest.mark.parametrize("name", ["training", "validation", "predict"])
def test_a_length_that_is_an_error_names_the_loader(name):
    run = {"training": "fit", "validation": "validate", "predict": "predict"}[name]
    with pytest.raises(ConfigurationError) as caught:
        getattr(trainer(), run)(Small(), Miscounted())
    says(caught.value, f"the {name} loader (Miscounted)", "RuntimeError: the index is not built", "def __len__(self)")


def test_an_optimizer_without_parameters_is_told():
    class Filtered(Small):
        def configure_optimizers(self):
            return torch.optim.SGD([p for n, p in self.named_parameters() if n.startswith("encoder.")], lr=0.1)

    with pytest.raises(ConfigurationError) as caught:
        trained(module=Filtered())
    says(caught.value, "parameters for every optimizer", "none", "self.net.parameters()")


def test_generator_that_is_used_up_in_the_second_epoch():
    module = Small()
    with pytest.raises(ConfigurationError) as caught:
        trained((rows(2) for _ in range(2)), module, max_epochs=2)
    says(caught.value, "a generator used up")
    assert module.seen == [0, 1]


def test_limit_below_one_batch_is_not_called_an_empty_loader():
    with pytest.raises(ConfigurationError) as caught:
        trained(limit_train_batches=0.1)
    says(caught.value, "limit_train_batches", "0.1")


def test_loader_that_is_none():
    with pytest.raises(ConfigurationError) as caught:
        trained(3)
    says(caught.value, "an iterable of batches", "Received: 3")


@pytest.mark.parametrize(
    "verb",
    ["optimizers", "lr_schedulers", "manual_backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer"],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_verb_outside_of_fit(verb, when):
    module = Small()
    if when == "after":
        trained(module=module)
        if verb in ("optimizers", "lr_schedulers"):
            return  # readable, see test_reading.py
    arguments = [] if verb in ("optimizers", "lr_schedulers") else [torch.ones(())]
    with pytest.raises(ProtocolError) as caught:
        getattr(module, verb)(*arguments)
    says(caught.value, f"{verb}() inside a run", f"self.{verb}(")


def test_trainer_before_fit():
    with pytest.raises(ProtocolError) as caught:
        _ = Small().trainer
    says(caught.value, "Small", ".fit(module)")


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("loss", "part"),
    [
        (lambda m, b: m.net(b), "shape (2, 1)"),
        (lambda m, b: m.loss(b).detach(), "without a graph"),
        (lambda m, b: torch.tensor(1.0), "without a graph"),
        (lambda m, b: 3.0, "float 3.0"),
        (lambda m, b: None, "NoneType None"),
        (lambda m, b: {"loss": m.loss(b)}, "dict"),
    ],
    ids=["vector", "detached", "constant", "float", "none", "dict"],
)
@pytest.mark.parametrize("options", [{}, SCALED], ids=["32-true", "16-mixed"])
def test_loss_that_cannot_be_differentiated(loss, part, options):
    def body(module, opt, batch):
        module.manual_backward(loss(module, batch))

    refused(ConfigurationError, body, "one element and a graph", part, "self.manual_backward(", **options)


def test_vector_with_its_gradient_is_fine():
    def body(module, opt, batch):
        opt.zero_grad()
        output = module.net(batch)
        module.manual_backward(output, gradient=torch.ones_like(output))
        opt.step()

    trained(module=Doing(body))


@register_backend
class Queued(CPU):
    """The cpu backend, used as a device that queues its work: values are read at log points only."""

    name = "queued"
    capabilities = replace(CPU.capabilities, asynchronous=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
class TestNonFiniteLoss:
    @staticmethod
    def module(value):
        def body(module, opt, batch):
            opt.zero_grad()
            module.manual_backward(module.loss(batch) * value)

        return Doing(body)

    def test_stop(self, value):
        module = self.module(value)
        with pytest.raises(NonFiniteLossError) as caught:
            trained(module=module, nonfinite_loss="stop")
        assert module.begun == 1
        assert str(value) in str(caught.value) or "inf" in str(caught.value)
        says(caught.value, "finite")

    @pytest.mark.parametrize("backend", ["cpu", "queued"])
    def test_warn_once(self, value, backend):
        def body(module, opt, batch):
            opt.zero_grad()
            module.manual_backward(module.loss(batch) + value)
            with torch.no_grad():
                module.net.bias.fill_(math.nan)  # another value, but no other news

        module = Doing(body)
        with pytest.warns(UserWarning, match="nonfinite_loss") as caught:
            trained(module=module, backend=backend, log_every_n_steps=1)
        assert module.begun == 4
        assert len(caught) == 1

    def test_ignore(self, value):
        trained(module=self.module(value), nonfinite_loss="ignore")

    def test_automatic(self, value):
        class Exploding(Automatic):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) * value

        with pytest.raises(NonFiniteLossError):
            trained(module=Exploding(), nonfinite_loss="stop")


@pytest.mark.parametrize("kind", [Doing, Automatic])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
class TestNonFiniteLossOnADeviceThatQueuesItsWork:
    @staticmethod
    def module(kind, value, first=0):
        """Make a module whose loss is `value` from its batch number `first` on."""

        class Exploding(Small):
            automatic = kind is Automatic

            def __init__(self):
                super().__init__()
                self.automatic_optimization = self.automatic

            def loss(self, batch):
                return super().loss(batch) + (value if len(self.seen) > first else 0.0)

            def training_step(self, batch, batch_idx):
                if not self.automatic:
                    return super().training_step(batch, batch_idx)
                self.seen.append(batch_idx)
                return self.loss(batch)

        return Exploding()

    def test_stop_at_the_next_log_point(self, kind, value):
        module = self.module(kind, value)
        with pytest.raises(NonFiniteLossError) as caught:
            trained(loader(5), module, backend="queued", nonfinite_loss="stop", log_every_n_steps=3)
        assert module.seen == [0, 1, 2]
        says(caught.value, "finite", f"Received: {value}")

    @pytest.mark.parametrize("every", [50, 0])
    def test_stop_at_the_end_if_there_is_no_log_point_before(self, kind, value, every):
        module = self.module(kind, value, first=4)
        with pytest.raises(NonFiniteLossError):
            trained(loader(5), module, backend="queued", nonfinite_loss="stop", log_every_n_steps=every)
        assert module.seen == [0, 1, 2, 3, 4]

    def test_warn_after_the_log_point(self, kind, value):
        class Watching(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                seen_at.append((len(module.seen), len(caught)))

        seen_at = []
        with pytest.warns(UserWarning, match="nonfinite_loss") as caught:
            trained(module=self.module(kind, value), backend="queued", log_every_n_steps=2, callbacks=Watching())
        assert seen_at == [(1, 0), (2, 0), (3, 1), (4, 1)]

    def test_ignore(self, kind, value):
        trained(module=self.module(kind, value), backend="queued", nonfinite_loss="ignore", log_every_n_steps=1)


@pytest.mark.parametrize("returned", [3.0, "loss", {"losses": 1}, [torch.ones(())]])
def test_automatic_step_that_returns_no_loss(returned):
    class Wrong(Automatic):
        def training_step(self, batch, batch_idx):
            return returned

    with pytest.raises(ConfigurationError) as caught:
        trained(module=Wrong())
    says(caught.value, type(returned).__name__, "return loss")


# ---------------------------------------------------------------- arguments that mean nothing


@pytest.mark.parametrize(
    "wrong",
    [
        *({"backend": value} for value in (5, CPU, [])),
        *({"backend": "cpu", "backend_options": value} for value in ("x", [1], {1: 1})),
        *({"backend": "cpu", "backend_options": {"timeout": value}} for value in ("x", -1, 0, math.nan, True)),
        *({"backend": "cpu", "backend_options": {"broadcast_start": value}} for value in ("no", 0, None)),
        *({"backend": "tpu", "backend_options": {"strict": value}} for value in ("no", 1)),
        *({"backend": "cuda", "backend_options": {"pin_memory": value}} for value in ("no", 1)),
        *({"fast_dev_run": value} for value in ("yes", 2.7, -1)),
        *({"default_root_dir": value} for value in (5, "")),
        *({"enable_progress_bar": value} for value in ("no", 0)),
        *({"inference_mode": value} for value in ("no", 1, None)),
        *({"scaler_kwargs": value} for value in ([1], "x", {1: 2})),
    ],
    ids=str,
)
def test_arguments_of_a_trainer_that_mean_nothing(wrong):
    with pytest.raises(ConfigurationError) as caught:
        trainer(**wrong)
    says(caught.value)


def test_a_class_is_told_to_be_called():
    with pytest.raises(ConfigurationError, match=r"Fix:  Trainer\(backend=CPU\(\)\)"):
        trainer(backend=CPU)


@pytest.mark.parametrize(
    "options",
    [{"init_scale": v} for v in (math.inf, math.nan, 0.0, -1.0, "a")]
    + [{"growth_interval": v} for v in (0, -1, 2.5)]
    + [{"growth_factor": 1.0}, {"backoff_factor": 1.0}, {"scale": 2.0}],
    ids=str,
)
def test_options_of_the_loss_scale_that_mean_nothing(options):
    with pytest.raises(ConfigurationError) as caught:
        trained(precision="16-mixed", scaler_kwargs=options)
    says(caught.value, next(iter(options)))


@pytest.mark.parametrize("name", ["device", "global_step", "optimizers", "log", "clip_gradients", "trainer"])
def test_attributes_that_a_run_needs_are_not_overwritten(name):
    with pytest.raises(ConfigurationError) as caught:
        setattr(Small(), name, 5)
    says(caught.value)


def test_one_optimizer_returned_twice():
    class Twice(Small):
        def configure_optimizers(self):
            return [super().configure_optimizers()] * 2

    with pytest.raises(ConfigurationError) as caught:
        trained(module=Twice())
    says(caught.value, "each optimizer once", "one SGD twice")


def test_frequency_of_an_optimizer_is_not_ignored():
    class Frequency(Small):
        def configure_optimizers(self):
            return {"optimizer": super().configure_optimizers(), "frequency": 2}

    with pytest.raises(ConfigurationError) as caught:
        trained(module=Frequency())
    says(caught.value, "'frequency': 2, which would be ignored", "if batch_idx % 2 == 0: opt.step()")


def test_a_module_without_data_is_named():
    module = Small()
    module.net.to("meta")
    with pytest.raises(ConfigurationError) as caught:
        trained(module=module)
    says(caught.value, "net.weight on the meta device", "to_empty")
