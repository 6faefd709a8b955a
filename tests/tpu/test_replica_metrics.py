"""What two replicas log: objects of torchmetrics give the value over both, and what one does apart is told on both."""

import re

import torch
import torchmetrics
from fresh import fresh
from test_replicas import REPLICAS, WORLD, Net, data, in_replicas, share

from xtrain import Trainer


class Logs(Net):
    """Trains, and logs what `odd` says; objects in the steps, which ask for values in the middle of them."""

    def __init__(self, odd: str) -> None:
        super().__init__("plain")
        self.odd = odd
        self.mean, self.largest = torchmetrics.MeanMetric(), torchmetrics.MaxMetric()
        self.seen = torchmetrics.CatMetric()

    def training_step(self, x, batch_idx):
        second = self.global_rank == 1
        if self.odd == "skip" and second and batch_idx == 1:
            return
        self.plain(x, batch_idx, *self.optimizers())
        if self.odd == "objects":
            self.mean(x)
            self.largest.update(x)
            self.log("mean", self.mean, on_step=False, on_epoch=True)
            self.log("largest", self.largest)
        if self.odd == "step metric" and second:
            self.log("mine", 1.0, sync_dist=True)
        if self.odd == "names":
            self.log(f"only{self.global_rank}", 1.0, sync_dist=True)
        if self.odd == "object of one":
            self.mean.update(x.mean())  # on both: a replica's number must not shape its graph
            if second:
                self.log("object", self.mean, on_step=False, on_epoch=True)

    def validation_step(self, x, batch_idx):  # three batches here, two there
        self.seen.update(x)
        self.log("validated", x.mean(), sync_dist=True)

    def on_validation_epoch_end(self):
        self.all_seen = self.seen.compute().tolist()


def logged(odd, rank):
    module = Logs(odd)
    trainer = Trainer("tpu", max_epochs=1, enable_progress_bar=False, log_every_n_steps=3, num_sanity_val_steps=0)
    validation = torch.utils.data.DataLoader(torch.arange(5.0), batch_size=1) if odd == "objects" else None
    try:
        trainer.fit(module, [share(batch, rank) for batch in data()], validation)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {name: float(value) for name, value in trainer.callback_metrics.items()} | {"seen": module.all_seen}


APART = {
    "step metric": r"rank 0 is to go on from a log point, .* step 2 .*rank 1 is to reduce what was logged .*\[mine\]",
    "names": r"'only0' from rank 0, not from rank 1",
    "object of one": r"'object' from rank 1, not from rank 0",
    "skip": r"rank 0 is to average 2 gradients of optimizer 0 .* step 1 of .*rank 1 is to .* step 2 of",
    "again": r"LaunchError: Expected replicas that are in step\.",
}


def all_of_them():
    found = {}
    for odd in ("objects", *APART):
        ends = in_replicas(lambda rank, odd=odd: logged(odd, rank))
        found[odd] = [ends[rank] for rank in range(WORLD)]
    return found


def test_replicas_share_what_they_log_or_are_told():
    found = fresh(all_of_them, **REPLICAS)
    for end in found.pop("objects"):
        assert abs(end["mean"] - data().mean().item()) < 1e-6
        assert end["largest"] == data().max().item()
        assert end["seen"] == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert end["validated"] == 2.0
    for odd, ends in found.items():
        for said in ends:
            assert isinstance(said, str), odd
            assert re.search(APART[odd], said), said
