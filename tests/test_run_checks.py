"""What a run looks at before it begins, says about steps that train nothing, and leaves behind when it fails."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from small import Automatic, Doing, Small, loader, net, says, trained, trainer
from torch.utils.data import DataLoader

from xtrain import Callback, ConfigurationError, LightningDataModule, LightningModule, ProtocolError
from xtrain.loggers import CSVLogger, Logger
from xtrain.run.checks import IDLE_BATCHES

# ---------------------------------------------------------------- one run at a time


def inside(call):
    """Fit a module whose second batch calls `call` with the module; return the error it got."""

    class Outer(Small):
        def validation_step(self, batch, batch_idx): ...

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            if batch_idx == 1 and calls:
                calls.pop()(self)

    calls, module, run = [call], Outer(), trainer()
    with pytest.raises(ProtocolError) as caught:
        run.fit(module, loader())
    assert run.stage is None
    trained(module=module)  # both can go on afterwards
    return caught.value


class Judge(Small):
    def validation_step(self, batch, batch_idx): ...


NESTED = {
    "another module": lambda module: module.trainer.validate(Judge(), loader()),
    "the same module": lambda module: module.trainer.validate(module, loader()),
    "a fit": lambda module: module.trainer.fit(Small(), loader()),
}


@pytest.mark.parametrize("call", NESTED.values(), ids=NESTED)
def test_a_run_inside_a_run_of_one_trainer_is_refused(call):
    says(inside(call), "one run of a Trainer at a time", "another, inside its fit", "another Trainer")


def test_one_module_in_the_runs_of_two_trainers_is_refused():
    error = inside(lambda module: trainer().fit(module, loader()))
    says(error, "a module in one run at a time", "one that is in a fit", "copy.deepcopy(module)")


def test_one_trainer_in_two_threads_is_refused():
    errors = []

    def other(run):
        try:
            run.fit(Small(), loader())
        except ProtocolError as error:
            errors.append(error)

    def call(module, opt, batch):
        thread = threading.Thread(target=other, args=(module.trainer,))
        thread.start()
        thread.join()

    with pytest.warns(UserWarning, match="a step of an optimizer"):
        trained(module=Doing(call))
    assert len(errors) == 4
    says(errors[0], "one run of a Trainer at a time")


def test_another_trainer_with_another_module_works_inside():
    results = []
    module = Doing(lambda module, opt, batch: results.append(trained()[1].global_step))
    with pytest.warns(UserWarning, match="a step of an optimizer"):
        trained(module=module)
    assert results == [4] * 4


# ---------------------------------------------------------------- training nothing


class NoOptimizer(Small):
    def configure_optimizers(self): ...


@pytest.mark.parametrize("base", [Automatic, NoOptimizer])
def test_no_optimizer_is_told(base):
    class Nothing(base):
        def training_step(self, batch, batch_idx): ...

        def configure_optimizers(self): ...

    with pytest.warns(UserWarning, match="none: nothing is trained by one") as caught:
        trained(module=Nothing())
    assert len(caught) == 1
    says(caught[0].message, "Nothing.configure_optimizers", "torch.optim.Adam(self.parameters())")


class ReturnsNone(Automatic):
    def training_step(self, batch, batch_idx): ...


@pytest.mark.filterwarnings("ignore:Expected a loss from training_step")
@pytest.mark.parametrize("module", [Doing(lambda *_: None), ReturnsNone()], ids=["manual", "automatic"])
def test_no_step_in_the_first_epoch_is_told_once(module):
    with pytest.warns(UserWarning, match="a step of an optimizer") as caught:
        trained(module=module, max_epochs=3)
    (said,) = [w for w in caught if "a step of an optimizer" in str(w.message)]
    says(said.message, "none of optimizer 0 (SGD) in 4 batches", "opt.step()")


def test_no_step_in_a_thousand_batches_is_told_before_the_epoch_ends():
    counts = []

    class Counting(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            counts.append(len(caught))

    with pytest.warns(UserWarning, match="a step of an optimizer") as caught:
        trained([0] * (IDLE_BATCHES + 5), Doing(lambda *_: None), callbacks=Counting(), max_epochs=2)
    assert counts.index(1) == IDLE_BATCHES + 1
    assert len(caught) == 1


def raw(module, opt, batch):
    module.manual_backward(module.loss(batch))
    opt.optimizer.step()


def test_raw_steps_are_steps_unless_max_steps_waits_for_a_count():
    trained(module=Doing(raw))
    with pytest.warns(UserWarning, match="a step of an optimizer"):
        trained(module=Doing(raw), max_steps=5, max_epochs=2)


class Generator(Small):
    def training_step(self, batch, batch_idx):
        yield super().training_step(batch, batch_idx)


class Coroutine(Small):
    async def training_step(self, batch, batch_idx): ...


class WaitingHook(Small):
    async def on_train_epoch_end(self): ...


@pytest.mark.parametrize(
    ("module", "kind"), [(Generator, "a generator"), (Coroutine, "coroutine"), (WaitingHook, "coroutine")]
)
def test_functions_that_would_never_run_are_refused(module, kind):
    with pytest.raises(ConfigurationError) as caught:
        trained(module=module())
    says(caught.value, f"{module.__name__}.", "to be a plain function", kind)


def test_parameters_that_are_not_the_modules_are_told():
    other = net()

    class Stranger(Small):
        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), *other.parameters()], lr=0.1)

    with pytest.warns(UserWarning, match="parameters of the module") as caught:
        trained(module=Stranger())
    says(caught[0].message, "optimizer 0 (SGD)", "2 others (shapes (1, 3), (1,))", "torch.nn.Parameter(image)")


def test_an_optimizer_that_no_loss_reaches_is_told_once_and_its_training_steps_count():
    class Unreached(Small):
        def configure_optimizers(self):
            self.other = net(seed=1)
            return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.net, self.other)]

        def training_step(self, batch, batch_idx):
            _, opt = self.optimizers()
            self.manual_backward(self.loss(batch))
            results.append(opt.step())

    results = []
    with pytest.warns(UserWarning, match="optimizer 1") as caught:
        _, run = trained(module=Unreached())
    assert [str(w.message).count("Expected gradients of optimizer 1 (SGD) to step on") for w in caught].count(1) == 1
    assert (results, run.global_step, run.life.optimizers[1].step_count) == ([False] * 4, 4, 0)


# ---------------------------------------------------------------- hooks


class Misspelt(Small):
    def on_train_batch_ends(self, outputs, batch, batch_idx): ...


class Older(Small):
    def training_epoch_end(self, outputs): ...


class OfCallback(Callback):
    def on_validation_epoch_ends(self, trainer, module): ...


@pytest.mark.parametrize(
    ("module", "callbacks", "name", "meant"),
    [
        (Misspelt, [], "Misspelt.on_train_batch_ends", "on_train_batch_end"),
        (Older, [], "Older.training_epoch_end", "on_train_epoch_end"),
        (Small, [OfCallback()], "OfCallback.on_validation_epoch_ends", "on_validation_epoch_end"),
    ],
)
def test_hooks_that_nobody_calls_are_named(module, callbacks, name, meant):
    with pytest.warns(UserWarning, match="nobody calls them") as caught:
        trained(module=module(), callbacks=callbacks)
    says(caught[0].message, name, f"def {meant}(self, ...)")


def test_methods_of_ones_own_are_no_hooks():
    class Own(Small):
        def on_policy_rollout(self): ...
        def on_reset(self): ...

    trained(module=Own())


class WrongHook(Small):
    def on_train_batch_end(self, outputs): ...


class WrongTransfer(Small):
    def transfer_batch_to_device(self, batch): ...


class ThreeArguments(Small):
    def training_step(self, batch, batch_idx, extra): ...


class KeywordsOnly(Small):
    def training_step(self, *, batch, batch_idx): ...


class WrongCallback(Callback):
    def on_train_start(self): ...


@pytest.mark.parametrize(
    ("module", "callbacks", "parts"),
    [
        (
            WrongHook,
            [],
            ("WrongHook.on_train_batch_end(outputs)", "def on_train_batch_end(self, outputs, batch, batch_idx)"),
        ),
        (WrongTransfer, [], ("WrongTransfer.transfer_batch_to_device(batch)", "(self, batch, device, dataloader_idx)")),
        (
            ThreeArguments,
            [],
            ("training_step(batch, batch_idx, extra)", "def training_step(self, batch, batch_idx)"),
        ),
        (KeywordsOnly, [], ("training_step(*, batch, batch_idx)", "def training_step(self, batch, batch_idx)")),
        (Small, [WrongCallback()], ("WrongCallback.on_train_start()", "def on_train_start(self, trainer, module)")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_signatures_that_cannot_be_called_are_quoted(module, callbacks, parts):
    with pytest.raises(ConfigurationError) as caught:
        trained(module=module(), callbacks=callbacks)
    says(caught.value, *parts)


# ---------------------------------------------------------------- a logger that cannot write


class Failing(Logger):
    name, version = "failing", 0

    def __init__(self):
        self.ended = []

    def log_metrics(self, metrics, step=None): ...

    def finalize(self, status):
        self.ended.append(status)
        raise OSError("no space left")


class Saving(Callback):
    def __init__(self):
        self.saved = []

    def on_exception(self, trainer, module, exception):
        self.saved.append(type(exception))


def test_the_users_error_comes_first_and_every_logger_is_ended(caplog):
    first, second, saving = Failing(), Failing(), Saving()
    body = Doing(lambda module, opt, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(module=body, logger=[first, second], callbacks=saving)
    assert (first.ended, second.ended, saving.saved) == (["failed"], ["failed"], [ZeroDivisionError])
    assert caplog.text.count("Failing could not end its log") == 2
    assert "no space left" in caplog.text


def test_on_exception_that_fails_still_ends_the_loggers(caplog):
    class Worse(Callback):
        def on_exception(self, trainer, module, exception):
            raise KeyError("worse") from exception

    logger = Failing()
    with pytest.raises(KeyError):
        trained(module=Doing(lambda module, opt, batch: 1 / 0), logger=logger, callbacks=Worse())
    assert logger.ended == ["failed"]


def test_a_log_that_cannot_be_ended_is_an_error_of_a_run_that_went_well(caplog):
    first, second = Failing(), Failing()
    with pytest.raises(OSError, match="no space left"):
        trained(logger=[first, second])
    assert (first.ended, second.ended) == (["success"], ["success"])


def test_a_place_that_cannot_be_written_to_is_refused_before_the_first_batch(tmp_path):
    (tmp_path / "file").touch()
    module = Small()
    with pytest.raises(ConfigurationError) as caught:
        trained(module=module, logger=CSVLogger(tmp_path / "file"))
    says(caught.value, "a folder that CSVLogger can write to")
    assert module.seen == []


# ---------------------------------------------------------------- what a run hangs on the user's objects


class Data(LightningDataModule):
    def collate(self, items):
        return torch.stack(items)

    def train_dataloader(self):
        return DataLoader(torch.randn(8, 3), batch_size=2, collate_fn=self.collate)  # type: ignore[arg-type]


def test_a_datamodule_goes_to_loader_workers_without_the_run():
    sent = []

    class Watching(Small):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            sent.append(pickle.loads(pickle.dumps(data.collate)).__self__.trainer)

    data = Data()
    run = trainer()
    run.fit(Watching(), datamodule=data)
    assert sent == [None] * 4
    assert data.trainer is run


def test_a_copy_of_a_wrapped_optimizer_is_free_of_the_run():
    copies = []
    module = Doing(lambda module, opt, batch: copies.append((copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)))))
    with pytest.warns(UserWarning, match="a step of an optimizer"):
        trained(module=module)
    for copied in copies[0]:
        assert copied.param_groups[0]["lr"] == 0.1
        assert copied.optimizer is not module.optimizers
        with pytest.raises(ProtocolError, match="an optimizer of a run"):
            copied.step()


# ---------------------------------------------------------------- tensors made in an evaluation


class Caching(LightningModule):
    """Makes a table in its first forward and keeps it."""

    def __init__(self, again=False):
        super().__init__()
        self.automatic_optimization = False
        self.net, self.table, self.again = net(), None, again

    def loss(self, x):
        if self.table is None:
            self.table = torch.linspace(0, 1, 3)
        return (self.net(x) * self.table).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.loss(batch))
        opt.step()

    def validation_step(self, batch, batch_idx):
        if self.again and self.trainer.global_step:
            self.table = None
        self.loss(batch)


def test_a_tensor_kept_from_the_sanity_check_may_be_trained_on():
    run = trained(module=Caching(), validate=loader(1))[1]
    assert run.global_step == 4


def test_a_tensor_kept_from_a_validation_names_inference_mode():
    with pytest.raises(ProtocolError) as caught:
        trained(module=Caching(again=True), validate=loader(1), max_epochs=2)
    says(caught.value, "tensors that training may use", "Trainer(inference_mode=False)")
    trained(module=Caching(again=True), validate=loader(1), max_epochs=2, inference_mode=False)
