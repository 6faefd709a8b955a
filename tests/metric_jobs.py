"""A training that keeps metrics of torchmetrics, stops in the middle of an epoch, and goes on."""

import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader

from xtrain import LightningModule, Trainer
from xtrain.callbacks import Callback

SAMPLES = torch.arange(1.0, 13.0).unsqueeze(1)


class Measured(LightningModule):
    def __init__(self, unreduced=False):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Linear(1, 1)
        self.mean, self.largest, self.all = (
            torchmetrics.MeanMetric(),
            torchmetrics.MaxMetric(),
            torchmetrics.CatMetric(),
        )
        if unreduced:
            self.all.add_state("last", torch.zeros(()), dist_reduce_fx=None)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        self.manual_backward(self.net(batch).square().mean())
        opt.step()
        for metric in (self.mean, self.largest, self.all):
            metric.update(batch)
        self.log("own", batch.sum(), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("largest", self.largest, on_step=False, on_epoch=True)

    def on_train_epoch_end(self):
        self.seen = sorted(self.all.compute().flatten().tolist())


class Stop(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def run(path, stop=None, go_on=False, unreduced=False, **ranks):
    """Train an epoch of twelve samples, up to the step `stop`; return what came of metrics and parameters."""
    torch.manual_seed(0)
    module, callbacks = Measured(unreduced), [] if stop is None else [Stop(path, stop)]
    trainer = Trainer(
        "cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks
    )
    try:
        trainer.fit(module, DataLoader(SAMPLES, batch_size=1, shuffle=True), ckpt_path=path if go_on else None)
    except KeyboardInterrupt:
        return None
    values = {name: float(trainer.callback_metrics[name]) for name in ("own", "mean", "largest")}
    return values, module.seen, [p.tolist() for p in module.parameters()]
