"""Checkpoints that Lightning 2.6.6 wrote in manual optimization: the training goes on to where Lightning's own went.

The files were made by this module under ``import lightning as L``, on 12 rows in batches of two, for three epochs:
saved in a callback inside of an epoch and at its last batch, and after fits that ended with an epoch and inside of one.
"""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from xtrain import CheckpointError, LightningModule, Trainer

FILES = Path(__file__).parent / "lightning"


class Model(LightningModule):
    def __init__(self, lr=0.1):
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        for opt in self.optimizers():
            opt.zero_grad()
            self.manual_backward((self.b(self.a(batch)) - 1).square().mean())
            opt.step()
        self.lr_schedulers().step()

    def configure_optimizers(self):
        first = torch.optim.Adam(self.a.parameters(), lr=self.hparams.lr)
        second = torch.optim.SGD(self.b.parameters(), lr=0.05, momentum=0.9)
        return [first, second], [torch.optim.lr_scheduler.ExponentialLR(first, 0.9)]


@pytest.mark.parametrize("name", ["inside", "last_batch", "end_of_epoch", "cut"])
def test_it_ends_where_lightning_ended(name):
    module = Model()
    data = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
    trainer = Trainer("cpu", max_epochs=3, enable_progress_bar=False)
    trainer.fit(module, DataLoader(data, 2), ckpt_path=FILES / f"{name}.ckpt")
    assert trainer.global_step == 18
    for key, value in torch.load(FILES / "never_stopped.pt", weights_only=True).items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-6, atol=1e-6, msg=key)


def test_weights_and_hyperparameters_alone():
    assert Model.load_from_checkpoint(FILES / "cut.ckpt").hparams == {"lr": 0.1}


def test_other_files_are_refused(tmp_path):
    for name, content in {"weights.ckpt": {"w": torch.ones(2)}, "object.ckpt": {"state_dict": Path("x")}}.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError) as caught:
            Model.load_from_checkpoint(tmp_path / name)
        assert name in str(caught.value)
