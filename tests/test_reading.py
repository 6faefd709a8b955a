"""What user code reads from a Trainer, during a run and after it, under Lightning's names."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
from small import Automatic, Small, loader, rows, says, trained, trainer
from torch.optim.lr_scheduler import StepLR

from xtrain import ConfigurationError, LightningDataModule, LightningModule, LightningOptimizer, Trainer
from xtrain.callbacks import EarlyStopping
from xtrain.loggers import CSVLogger


class Scheduled(Small):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, 1)]

    def validation_step(self, batch, batch_idx):
        pass

    test_step = predict_step = validation_step


def test_optimizers_and_schedulers_stay_readable():
    module, run = trained(module=Scheduled())
    for _ in range(2):
        wrapped = module.optimizers()
        assert isinstance(wrapped, LightningOptimizer)
        assert wrapped.optimizer is module.optimizers(use_pl_optimizer=False)
        assert isinstance(module.lr_schedulers(), StepLR)
        assert run.optimizers == [wrapped.optimizer]
        assert [config.scheduler for config in run.lr_scheduler_configs] == [module.lr_schedulers()]
        assert "param_groups" in wrapped.state_dict()
        run.validate(module, loader())  # and the second time, after another run


def test_optimizers_of_a_trainer_are_raw():
    class Late(Scheduled):
        def on_train_start(self):
            self.late = StepLR(self.trainer.optimizers[0], 1)

    assert isinstance(trained(module=Late())[0].late, StepLR)


def test_evaluation_before_a_fit_has_no_optimizers():
    class Asking(Small):
        def validation_step(self, batch, batch_idx):
            self.seen.append((self.optimizers(), self.lr_schedulers()))

    module = Asking()
    trainer().validate(module, loader(1))
    assert module.seen == [([], None)]


@pytest.mark.parametrize("task", ["fit", "validate", "test", "predict"])
def test_state(task):
    class Asking(Scheduled):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.look(batch, batch_idx)

        def look(self, batch, batch_idx):
            state = self.trainer.state
            self.seen.append((state.status.value, state.fn.value, state.stage.value, self.trainer.evaluating))

        validation_step = test_step = predict_step = look

    module, run = Asking(), trainer(num_sanity_val_steps=0)
    assert run.state.fn is None
    getattr(run, task)(module, loader(1))
    stage = {"fit": "train"}.get(task, task)
    assert module.seen[-1] == ("running", task, stage, task in ("validate", "test"))
    assert run.state.finished
    assert (run.state.fn, run.state.stage, run.interrupted) == (task, None, False)


def test_state_of_the_sanity_check_and_of_an_interrupted_fit():
    class Interrupted(Small):
        def training_step(self, batch, batch_idx):
            raise KeyboardInterrupt

        def validation_step(self, batch, batch_idx):
            self.seen.append(self.trainer.state.stage.value)

    module, run = Interrupted(), trainer()
    with pytest.raises(KeyboardInterrupt):
        run.fit(module, loader(), loader(1))
    assert module.seen == ["sanity_check"]
    assert run.interrupted
    assert not run.state.finished


@pytest.mark.parametrize("task", ["fit", "validate", "test", "predict"])
def test_setup_and_teardown_get_a_stage_that_is_text_and_member(task):
    seen = []

    class Both:
        def setup(self, stage):
            seen.append((stage == task, stage.value, f"{stage}", isinstance(stage, str)))

        teardown = setup

    class Module(Both, Scheduled): ...

    class Data(Both, LightningDataModule): ...

    getattr(trainer(), task)(Module(), loader(1), datamodule=Data())
    assert seen == [(True, task, task, True)] * 4


def test_loaders_and_their_sizes():
    one, other, train = loader(3), loader(5), {"a": loader(4), "b": loader(2)}

    class Nothing(Scheduled):
        def training_step(self, batch, batch_idx):
            pass

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

        test_step = predict_step = validation_step

    run, module = trainer(limit_val_batches=4, limit_test_batches=0.5), Nothing()
    assert (run.num_val_batches, run.train_dataloader, run.val_dataloaders) == ([], None, None)
    run.fit(module, train, [one, other])
    assert (run.num_training_batches, run.num_val_batches, run.num_sanity_val_batches) == (4, [3, 4], [2, 2])
    assert run.train_dataloader == train
    assert run.val_dataloaders == [one, other]
    assert run.enable_validation
    run.test(module, other)
    assert (run.test_dataloaders, run.num_test_batches) == (other, [2])
    run.predict(module, (rows(2) for _ in range(3)))
    assert run.num_predict_batches == [math.inf]


def test_log_dir(tmp_path):
    assert trainer(default_root_dir=tmp_path).log_dir == str(tmp_path)
    logger = CSVLogger(tmp_path)
    assert trainer(logger=logger).log_dir == logger.log_dir


def test_home_in_the_root_directory():
    assert trainer(default_root_dir="~/runs").default_root_dir == str(Path.home() / "runs")


def test_where_it_runs():
    _, run = trained()
    assert (run.num_nodes, run.num_devices, run.device_ids, run.node_rank) == (1, 1, [0], 0)
    assert run.model is run.lightning_module


def test_callbacks_by_kind():
    stopping = EarlyStopping("loss")
    run = trainer(callbacks=[stopping], enable_progress_bar=True)
    assert (run.early_stopping_callback, run.early_stopping_callbacks) == (stopping, [stopping])
    assert run.progress_bar_callback is run.callbacks[-1]
    assert trainer().progress_bar_callback is None


def test_counters_of_the_fit_loop():
    class Counting(Small):
        def training_step(self, batch, batch_idx):
            loop = self.trainer.fit_loop
            self.seen.append((loop.total_batch_idx, loop.epoch_loop.total_batch_idx, loop.epoch_loop.batch_idx))
            self.trainer.run.life.stepped = True

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert self.trainer.fit_loop.total_batch_idx == self.seen[-1][0]

        def on_train_epoch_end(self):
            assert self.trainer.fit_loop.total_batch_idx == self.seen[-1][0]

    module, run = trained(loader(3), Counting(), max_epochs=2)
    assert module.seen == [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 0), (4, 4, 1), (5, 5, 2)]
    assert run.fit_loop.epoch_progress.current.completed == 2
    assert run.fit_loop.epoch_loop.batch_progress.total.completed == 6
    assert run.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed == 6
    assert run.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed == 6


def test_counters_that_a_module_sets():
    class Going(Automatic):
        """As so-vits-svc-fork goes on from a checkpoint of its own."""

        def on_train_start(self):
            loop = self.trainer.fit_loop
            loop.epoch_progress.current.completed = loop.epoch_progress.current.processed = 5
            loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = 70
            loop.epoch_loop.batch_progress.total.ready = loop.epoch_loop.batch_progress.total.completed = 70

        def training_step(self, batch, batch_idx):
            self.seen.append((self.current_epoch, self.global_step, self.trainer.fit_loop.epoch_loop.total_batch_idx))
            return self.loss(batch)

    module, run = trained(loader(2), Going(), max_epochs=6)
    assert module.seen == [(5, 70, 70), (5, 71, 71)]
    assert run.global_step == 72


@pytest.mark.parametrize("name", ["validate_loop", "precision_plugin", "tuner"])
def test_attribute_that_only_lightning_has(name):
    class Hidden(LightningModule):
        @property
        def inside(self):
            return getattr(self.trainer, name)

    module = Hidden()
    module.trainer = trainer()
    with pytest.raises(ConfigurationError) as caught:
        _ = module.inside
    says(caught.value, f"trainer.{name}")
    assert not hasattr(module.trainer, "nonsense")


@pytest.mark.parametrize("options", [{}, {"accelerator": "auto"}, {"precision": "16-mixed", "callbacks": []}])
def test_trainer_through_pickle(options):
    run = pickle.loads(pickle.dumps(Trainer("cpu", max_epochs=1, **options)))
    module = Small()
    run.fit(module, loader())
    assert module.seen == [0, 1, 2, 3]


def test_trainer_through_pickle_after_a_fit():
    _, run = trained()
    again = pickle.loads(pickle.dumps(run))
    assert (again.global_step, again.current_epoch) == (4, 1)
    assert again.state.fn is None  # the run itself stays behind
