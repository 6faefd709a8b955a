"""The order of hooks is Lightning's, as recorded by running this file's module and callback under it."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
from small import loader, net, rows, says, trainer

from xtrain import LightningModule, ProtocolError
from xtrain.callbacks import Callback
from xtrain.hooks import ModuleHooks

# Lightning's order (2.6.6), abbreviated: "c" is the callback, "m" the module, "on_" is left out and
# "both" stands for the callback's hook followed by the module's.


def both(*names: str) -> list[str]:
    return [f"{who} {name}" for name in names for who in ("c", "m")]


TRANSFER = ["m before_batch_transfer", "m transfer_batch_to_device", "m after_batch_transfer"]
START = ["m prepare_data", *both("setup"), "m configure_model"]
END = both("teardown")
GRADIENT = [*both("before_backward"), "m backward", *both("after_backward")]


def evaluation(name: str, batches: int = 1) -> list[str]:
    batch = [*TRANSFER, *both(f"{name}_batch_start"), f"m {name}_step", *both(f"{name}_batch_end")]
    before = [f"m {name}_model_eval", *both(f"{name}_start", f"{name}_epoch_start")]
    after = [*both(f"{name}_epoch_end", f"{name}_end"), *([f"m {name}_model_train"] if name != "predict" else [])]
    return [*before, *batch * batches, *after]


def fitting(batches: list[list[str]]) -> list[str]:
    sanity = ["c sanity_check_start", *evaluation("validation"), "c sanity_check_end"]
    epoch = [
        hook for batch in batches for hook in (*TRANSFER, *both("train_batch_start"), *batch, *both("train_batch_end"))
    ]
    return [
        *(*START, "m configure_optimizers", *both("fit_start"), *sanity, *both("train_start", "train_epoch_start")),
        *(*epoch, "m validation_model_zero_grad", *evaluation("validation")),
        *(*both("train_epoch_end", "train_end", "fit_end"), *END),
    ]


MANUAL = ["m training_step", *GRADIENT, *both("before_optimizer_step")]
CLIP_AND_STEP = [*both("before_optimizer_step"), "m configure_gradient_clipping"]
ZERO = [*both("before_zero_grad"), "m optimizer_zero_grad"]
AUTOMATIC = ["m optimizer_step", "m training_step", *ZERO, *GRADIENT, *CLIP_AND_STEP]
ACCUMULATING = ["m training_step", *ZERO, *GRADIENT]
ACCUMULATED = ["m optimizer_step", "m training_step", *GRADIENT, *CLIP_AND_STEP]

LIGHTNING = {
    "manual": fitting([MANUAL, MANUAL]),
    "automatic": fitting([AUTOMATIC, [*AUTOMATIC, "m lr_scheduler_step"]]),
    "accumulating": fitting([ACCUMULATING, [*ACCUMULATED, "m lr_scheduler_step"]]),
    "validate": [*START, *evaluation("validation", 2), *END],
    "test": [*START, *evaluation("test", 2), *END],
    "predict": [*START, *evaluation("predict", 2), *END],
}


def as_xtrain(mode: str) -> list[str]:
    """Lightning's order with the deliberate differences applied.

    * ``opt.zero_grad()`` in a manual step calls ``on_before_zero_grad``, as its name says; Lightning
      calls that hook in automatic optimization only.
    * ``optimizer_zero_grad`` calls ``opt.zero_grad()``, and that calls ``on_before_zero_grad``: the
      overridable method comes first, so a module that replaces it decides about the hook too.
    """
    order = list(LIGHTNING[mode])
    if mode == "manual":
        return insert_after(order, "m training_step", both("before_zero_grad"))
    if mode in ("automatic", "accumulating"):
        order = [name for name in order if name != "m optimizer_zero_grad"]
        return insert_before(order, "c before_zero_grad", ["m optimizer_zero_grad"])
    return order


def insert_after(order: list[str], name: str, added: list[str]) -> list[str]:
    return [item for hook in order for item in ([hook, *added] if hook == name else [hook])]


def insert_before(order: list[str], name: str, added: list[str]) -> list[str]:
    return [item for hook in order for item in ([*added, hook] if hook == name else [hook])]


# ---------------------------------------------------------------- the recording


def recording(name, who):
    def hook(self, *args, **kwargs):
        self.log_of_hooks.append(f"{who} {name.removeprefix('on_')}")
        return getattr(super(type(self), self), name)(*args, **kwargs)

    return hook


def record_all(cls):
    """Make `cls` note every hook and step of its base, then do what the base does."""
    who = "c" if issubclass(cls, Callback) else "m"
    names = [name for base in cls.__mro__[1:-1] for name in vars(base) if name.startswith(("on_", "setup", "teardown"))]
    names += ["prepare_data", "configure_model", "transfer_batch_to_device"] if who == "m" else []
    names += cls.own if who == "m" else []
    for name in set(names) - {"on_exception"}:
        setattr(cls, name, recording(name, who))
    return cls


class Base(LightningModule):
    def __init__(self, log, manual):
        super().__init__()
        self.automatic_optimization = not manual
        self.net, self.log_of_hooks = net(), log

    def forward(self, batch):
        return self.net(batch)

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).pow(2).mean()
        if self.automatic_optimization:
            return loss
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(opt, gradient_clip_val=1.0)
        opt.step()
        return None

    def validation_step(self, batch, batch_idx): ...

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@record_all
class Module(Base):
    own = [
        *("training_step", "validation_step", "test_step", "predict_step", "configure_optimizers", "optimizer_step"),
        *("optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step", "backward"),
    ]


@record_all
class Recorder(Callback):
    def __init__(self, log):
        self.log_of_hooks = log


OPTIONS = {
    "manual": {},
    "automatic": {"gradient_clip_val": 1.0},
    "accumulating": {"gradient_clip_val": 1.0, "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("mode", LIGHTNING)
def test_order(mode):
    log = []
    run = trainer(callbacks=[Recorder(log)], num_sanity_val_steps=1, **OPTIONS.get(mode, {}))
    module = Module(log, mode == "manual")
    if mode in OPTIONS:
        run.fit(module, loader(2), loader(1))
    else:
        getattr(run, mode)(module, loader(2))
    assert log == as_xtrain(mode)


def test_the_deliberate_differences_are_the_only_ones():
    for mode in LIGHTNING:
        changed = set(as_xtrain(mode)) ^ set(LIGHTNING[mode])
        assert changed == (set(both("before_zero_grad")) if mode == "manual" else set())


# ---------------------------------------------------------------- what hooks get and may do


def test_callbacks_run_in_their_order_before_the_module():
    log = []

    class Named(Callback):
        def __init__(self, name):
            self.name = name

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            log.append(self.name)

    class Last(Base):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            log.append("module")

    trainer(callbacks=[Named("first"), Named("second")]).fit(Last([], True), loader(1))
    assert log == ["first", "second", "module"]


def test_what_hooks_get():
    log = []

    class Arguments(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            assert not any(t.requires_grad for t in (outputs["loss"], outputs["note"][1]))
            log.append(("train", trainer, module, outputs["note"][0], batch.shape, batch_idx))

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            log.append(("validate", outputs, batch_idx, dataloader_idx))

        def on_before_backward(self, trainer, module, loss):
            log.append(("loss", loss.dim()))

        def on_before_optimizer_step(self, trainer, module, optimizer):
            log.append(("step", optimizer is module.optimizers().optimizer))

    class Answering(Base):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            return {"loss": self.net(batch).mean(), "note": ["kept", self.net(batch)]}

        def validation_step(self, batch, batch_idx, dataloader_idx):
            return f"validated {dataloader_idx}"

    module = Answering([], True)
    run = trainer(callbacks=Arguments(), num_sanity_val_steps=0)
    run.fit(module, loader(1), [loader(1), loader(2)])
    assert log == [
        ("loss", 0),
        ("step", True),
        ("train", run, module, "kept", (2, 3), 0),
        ("validate", "validated 0", 0, 0),
        ("validate", "validated 1", 0, 1),
        ("validate", "validated 1", 1, 1),
    ]


@pytest.mark.filterwarnings("ignore:Expected a loss from training_step")
@pytest.mark.parametrize(
    ("kind", "returned", "every", "expected"),
    [
        ("manual", None, 1, {}),
        ("manual", torch.tensor(2.0), 1, {"loss": 2.0}),
        ("automatic", None, 1, {}),
        ("automatic", 2.0, 1, {"loss": 2.0}),
        ("automatic", {"loss": 2.0}, 2, {"loss": 1.0}),
    ],
)
def test_outputs_after_a_batch_are_a_detached_dict(kind, returned, every, expected):
    """As Lightning's: with the loss under its name, divided as it was for the backward."""
    log = []

    class Returning(Base):
        def training_step(self, batch, batch_idx):
            if kind == "manual" or returned is None:
                return returned
            loss = self.net(batch).sum() * 0 + 2.0
            return {"loss": loss} if isinstance(returned, dict) else loss

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert not any(value.requires_grad for value in outputs.values())
            log.append({name: value.item() for name, value in outputs.items()})

    trainer(accumulate_grad_batches=every).fit(Returning([], kind == "manual"), loader(2))
    assert log == [expected] * 2


@pytest.mark.filterwarnings("ignore:Expected every layer in train mode")
def test_a_module_that_changes_the_modes_of_its_layers():
    log = []

    class Frozen(Base):
        def __init__(self):
            super().__init__([], True)
            self.norm = torch.nn.BatchNorm1d(3)

        def on_validation_model_eval(self):
            super().on_validation_model_eval()
            self.norm.train()

        def on_validation_model_train(self):
            self.net.train()

        def validation_step(self, batch, batch_idx):
            log.append((self.net.training, self.norm.training))

    module = Frozen()
    module.eval()
    trainer(num_sanity_val_steps=0).fit(module, loader(1), loader(1))
    assert log == [(False, True)]
    assert (module.net.training, module.norm.training) == (True, True)


def test_gradients_outlive_validation_unless_the_module_drops_them():
    class Keeping(Base):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.net(batch).mean())

        def validation_step(self, batch, batch_idx):
            self.kept = self.net.weight.grad is not None

    class Dropping(Keeping):
        def on_validation_model_zero_grad(self):
            super().on_validation_model_zero_grad()

    for kind, kept in ((Keeping, True), (Dropping, False)):
        module = kind([], True)
        trainer(num_sanity_val_steps=0).fit(module, loader(1), loader(1))
        assert module.kept is kept


@pytest.mark.parametrize("manual", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_backward_of_the_modules_own(manual, precision):
    """It is called with the loss, once per backward, and what it does is what trains."""

    class Doubling(Base):
        def backward(self, loss, *args, **kwargs):
            log.append(loss.dim())
            super().backward(loss * 2, *args, **kwargs)

    log, weights = [], []
    scaling = {"scaler_kwargs": {"init_scale": 4.0}} if precision == "16-mixed" else {}
    for kind, lr in ((Doubling, 0.1), (Base, 0.2)):
        module = kind([], manual)
        module.net.load_state_dict(net().state_dict())
        module.clip_gradients = lambda *args, **kwargs: None
        module.configure_optimizers = partial(torch.optim.SGD, module.parameters(), lr=lr)
        trainer(precision=precision, **scaling).fit(module, loader(3))
        weights.append(module.net.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
    assert log == [0, 0, 0]


def test_a_backward_that_goes_around_the_loss_scale_is_refused():
    class Around(Base):
        def backward(self, loss):
            loss.backward()

    with pytest.raises(ProtocolError) as caught:
        trainer(precision="16-mixed").fit(Around([], True), loader(1))
    says(caught.value, "manual_backward")
    trainer().fit(Around([], True), loader(1))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_gradients_are_true_before_the_optimizer_steps(precision):
    """They were unscaled, and can be looked at or changed there."""
    found = []

    class Looking(Base):
        def training_step(self, batch, batch_idx):
            self.expected = torch.autograd.grad(self.net(batch).float().sum(), self.net.weight)[0]
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(self.net(batch).float().sum())
            opt.step()

        def on_before_optimizer_step(self, optimizer):
            found.append(torch.allclose(self.net.weight.grad, self.expected, rtol=1e-2))
            self.net.weight.grad.zero_()

    module = Looking([], True)
    before = module.net.weight.clone()
    scaling = {"scaler_kwargs": {"init_scale": 4.0}} if precision == "16-mixed" else {}
    trainer(precision=precision, **scaling).fit(module, [rows(2)])
    assert found == [True]
    assert torch.equal(module.net.weight, before)


def test_hook_assigned_to_an_instance():
    log = []
    module = Base([], True)
    module.on_train_start = lambda: log.append("started")
    trainer().fit(module, loader(1))
    assert log == ["started"]


def test_module_and_callback_know_the_same_hooks():
    shared = set(vars(ModuleHooks)) & set(vars(Callback))
    for name in sorted(name for name in shared if name.startswith("on_")):
        ours = list(inspect.signature(getattr(ModuleHooks, name)).parameters)[1:]
        theirs = list(inspect.signature(getattr(Callback, name)).parameters)[3:]
        assert ours == theirs, name
    assert len(shared) > 30
