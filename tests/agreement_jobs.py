"""What the tests of agreement run on every rank: fits in which one rank does something else."""

import torch
from rank_jobs import Stream
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from xtrain import Callback, LightningModule, Trainer, XTrainError, seed_everything

ROWS = torch.randn(48, 3, generator=torch.Generator().manual_seed(3))


class Pair(LightningModule):
    """Two layers with an optimizer each. `odd` is called in each step with the module and its index."""

    def __init__(self, odd=None, order=(0, 1)) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 1)
        self.odd, self.order = odd, order

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.first, self.second)]

    def loss(self, batch):
        return self.second(self.first(batch).tanh()).square().mean()

    def train_on(self, batch, numbers):
        optimizers = self.optimizers()
        for number in numbers:
            optimizers[number].zero_grad()
            self.manual_backward(self.loss(batch))
            optimizers[number].step()

    def training_step(self, batch, batch_idx):
        batch = batch[0]
        done = self.odd(self, batch, batch_idx) if self.odd else None
        if done is None:
            self.train_on(batch, self.order)


def trained(module, loader=None, validation=None, callbacks=None, **options):
    """Fit; return the trainer, or the text of the error."""
    settings = {"max_epochs": 2, "enable_progress_bar": False, "backend_options": {"timeout": 20}, **options}
    trainer = Trainer("cpu", callbacks=callbacks, **settings)
    loader = DataLoader(TensorDataset(ROWS), batch_size=4) if loader is None else loader
    try:
        trainer.fit(module, loader, validation)
    except XTrainError as error:
        return f"{type(error).__name__}: {error}"
    return trainer


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# ---------------------------------------------------------------- what one rank does apart


def skip(module, batch, index):
    return "nothing" if module.global_rank == 1 and index == 2 else None


def one_optimizer(module, batch, index):
    if module.global_rank == 1 and index == 2:
        module.train_on(batch, [0])
        return "done"
    return None


def other_order(module, batch, index):
    if module.global_rank == 1 and index == 2:
        module.train_on(batch, [1, 0])
        return "done"
    return None


def gather_alone(module, batch, index):
    if module.global_rank == 1 and index == 2:
        module.all_gather(torch.ones(3))


def gather_other_shape(module, batch, index):
    module.all_gather(torch.ones(3 + module.global_rank))


def broadcast_alone(module, batch, index):
    if module.global_rank == 1 and index == 2:
        module.trainer.broadcast({"a": 1})


def wait_alone(module, batch, index):
    if module.global_rank == 1 and index == 2:
        module.trainer.barrier()


def log_step_alone(module, batch, index):
    if module.global_rank == 1 or index < 2:
        module.log("mine", 1.0, sync_dist=True)


def log_epoch_alone(module, batch, index):
    module.log("ours", 1.0, sync_dist=True, on_step=False, on_epoch=True)
    if module.global_rank == 1:
        module.log("mine", 1.0, sync_dist=True, on_step=False, on_epoch=True)


def log_alone_before_a_log_point(module, batch, index):
    module.log("ours", 1.0, sync_dist=True, on_step=False, on_epoch=True)
    if module.global_rank == 1:
        module.log("mine", 1.0, sync_dist=True)


def log_other_name(module, batch, index):
    module.log(f"only{module.global_rank}", 1.0, sync_dist=True)


def log_other_reduction(module, batch, index):
    reduce_fx = ("max", "min")[module.global_rank]
    module.log("ours", 1.0, sync_dist=True, on_step=False, on_epoch=True, reduce_fx=reduce_fx)


def write_by_hand(module, batch, index):
    if module.global_rank == 1 and index == 2:
        module.second.bias.data.fill_(7.0)


def raise_alone(module, batch, index):
    if module.global_rank == 1 and index == 2:
        raise XTrainError("on purpose")


def apart(odd, options, world_size, rank):
    """Train with `odd`; return the error's text, or the parameters."""
    seed_everything(1)
    module = Pair(odd)
    end = trained(module, log_every_n_steps=1, **options)
    return end if isinstance(end, str) else parameters(module).tolist()


def log_apart(odd, world_size, rank):
    """Train without log points before the end of the epoch."""
    return trained(Pair(odd), log_every_n_steps=50)


class Hook(Callback):
    """Ends the epoch from one rank's hook."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        return -1 if trainer.global_rank == 1 and batch_idx == 2 else None


def hook_of_one_rank(world_size, rank):
    return trained(Pair(), callbacks=Hook())


class Mean:
    """What torchmetrics has in common: it accumulates by itself."""

    def reset(self):
        self.values = []

    def update(self, value):
        self.values = [*getattr(self, "values", []), value]

    def forward(self, value):
        self.update(value)
        return value

    def compute(self):
        return torch.stack(self.values).mean()


class MetricObject(Pair):
    """Logs an object that reduces itself, on one rank only."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = Mean()

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        if self.global_rank == 1:
            self.mean.update(torch.ones(()))
            self.log("object", self.mean, on_step=False, on_epoch=True)


def object_of_one_rank(world_size, rank):
    return trained(MetricObject())


# ---------------------------------------------------------------- an end that one rank asks for


class Asks(Callback):
    """Sets should_stop on one rank, in `where`, in the third batch or the first epoch."""

    def __init__(self, where) -> None:
        self.where = where

    def ask(self, trainer):
        if trainer.global_rank == 1:
            trainer.should_stop = True

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.where == "before" and batch_idx == 2:
            self.ask(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.where == "after" and batch_idx == 2:
            self.ask(trainer)

    def on_validation_end(self, trainer, pl_module):
        if self.where == "validation" and not trainer.sanity_checking:
            self.ask(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.where == "epoch":
            self.ask(trainer)


class Validated(Pair):
    """Logs a metric over ranks per epoch, as what used to abort the interpreter."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("loss", 1.0, sync_dist=True, on_step=False, on_epoch=True)

    def validation_step(self, batch, batch_idx):
        self.log("val", 1.0, sync_dist=True)


def asked(where, world_size, rank):
    """Return the steps that were made, whether the end is known here, and the parameters."""
    seed_everything(1)
    module = Validated()
    validation = DataLoader(TensorDataset(ROWS[:8]), batch_size=4)
    end = trained(module, None, validation, Asks(where), val_check_interval=3, max_epochs=4)
    return end if isinstance(end, str) else (end.global_step, end.should_stop, parameters(module).tolist())


# ---------------------------------------------------------------- values that ranks share


class Plateau(Pair):
    """A schedule that follows a synced value of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def configure_optimizers(self):
        optimizers = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizers[0], patience=0, factor=0.5)
        return optimizers, [plateau]

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        loss = self.loss(batch[0]).detach()
        self.log("loss", loss, sync_dist=True)
        self.log("local", loss)
        self.seen.append((loss.item(), self.trainer.callback_metrics.get("loss")))
        if "loss" in self.trainer.callback_metrics:
            self.lr_schedulers().step(self.trainer.callback_metrics["loss"])


def plateau(world_size, rank):
    seed_everything(1)
    module = Plateau()
    trainer = trained(module, log_every_n_steps=1)
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    seen = [(own, None if shared is None else shared.item()) for own, shared in module.seen]
    return rate, seen, parameters(module).tolist(), trainer.callback_metrics["local"].item()


class Monitors(LightningModule):
    """The same in automatic optimization, where the schedule reads the value by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss", "interval": "step"}}

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss


def monitored(world_size, rank):
    seed_everything(1)
    module = Monitors()
    trainer = trained(module)
    return trainer.optimizers[0].param_groups[0]["lr"], parameters(module).tolist()


class Orders(Pair):
    """Logs two metrics, in another order on each rank."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        for name in ("a", "b") if self.global_rank == 0 else ("b", "a"):
            self.log(name, {"a": 1.0, "b": 100.0}[name], sync_dist=True, on_step=True, on_epoch=True)


def orders(world_size, rank):
    trainer = trained(Orders(), log_every_n_steps=1)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


class Codebook(Pair):
    """A buffer that the forward moves, and batch statistics, which stay each rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("code", torch.zeros(3))
        self.register_buffer("graph", torch.eye(3).to_sparse())

    def training_step(self, batch, batch_idx):
        self.code.lerp_(self.norm(batch[0]).detach().abs().mean(0), 0.5)
        super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.used = self.code.clone()


def codebook(world_size, rank):
    module = Codebook()
    validation = DataLoader(TensorDataset(ROWS[:8]), batch_size=4)
    end = trained(module, None, validation)
    return end if isinstance(end, str) else (module.used.tolist(), module.norm.running_mean.tolist())


# ---------------------------------------------------------------- data


class Lies(DataLoader):
    """Says that it has ten batches, on rank 1."""

    lies = False

    def __len__(self):
        return 10 if self.lies else super().__len__()


def short_loader(world_size, rank):
    data = TensorDataset(ROWS[:16])
    loader = Lies(data, batch_size=4, sampler=DistributedSampler(data, world_size, rank))
    loader.lies = rank == 1
    return trained(Pair(), loader, uneven_batches="finish")


class Counts(Pair):
    """Remembers what it was evaluated on."""

    def validation_step(self, batch, batch_idx):
        self.log("mean", batch.float().mean(), sync_dist=True)
        self.log("newest", batch.float().mean(), sync_dist=True, on_step=True, on_epoch=False)

    def predict_step(self, batch, batch_idx):
        return batch


def evaluated(count, batch_size, world_size, rank):
    """Validate and predict the numbers below `count`."""
    trainer = Trainer("cpu", enable_progress_bar=False, log_every_n_steps=1)
    loader = DataLoader(torch.arange(count), batch_size=batch_size)
    trainer.validate(Counts(), loader)
    mean = trainer.callback_metrics["mean"].item()
    predicted = trainer.predict(Counts(), loader)
    return mean, [number for batch in predicted for number in batch.tolist()]


class Rows(Stream):
    def __iter__(self):
        return ([ROWS[n : n + 4]] for n in super().__iter__())


def endless(world_size, rank):
    """Read a stream of unknown length, from which rank 1 wants to stop."""
    module = Validated()
    end = trained(module, Rows(40), None, Asks("before"), max_epochs=1)
    return end if isinstance(end, str) else end.global_step


# ---------------------------------------------------------------- anything


class Planned(Pair):
    """Does in each step what its plan says: numbers of optimizers to step, names of metrics, a collective, an end."""

    def __init__(self, steps) -> None:
        super().__init__()
        self.steps = steps

    def training_step(self, batch, batch_idx):
        plan = self.steps[batch_idx]
        if plan["gathers"]:
            self.all_gather(batch)
        self.train_on(batch, plan["optimizers"])
        for name in plan["names"]:
            self.log(name, batch.sum(), sync_dist=True)
        if plan["stops"]:
            self.trainer.should_stop = True


def rows_of(rank, step):
    return ROWS[4 * step + 2 * rank :][:2]


class Unsized:
    """The batches of a rank, without a length."""

    def __init__(self, batches) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def planned(plans, world_size, rank):
    """Train by the plan of this rank; return the error's text, or parameters, synced metrics and steps made."""
    seed_everything(1)
    plan = plans[rank]
    module = Planned(plan["steps"])
    batches = [rows_of(rank, step) for step in range(len(plan["steps"]))]
    loader = batches if plan["sized"] else Unsized(batches)
    end = trained(module, loader, log_every_n_steps=1, max_epochs=1)
    if isinstance(end, str):
        return end
    metrics = {name: value.item() for name, value in end.callback_metrics.items()}
    return parameters(module).tolist(), metrics, end.progress.batches


def by_hand(plans):
    """Return what both ranks must come to, in plain PyTorch; None if what they do differs."""
    seed_everything(1)
    module = Pair()
    optimizers = module.configure_optimizers()
    metrics, made = {}, 0
    for index, (ours, theirs) in enumerate(zip(plans[0]["steps"], plans[1]["steps"], strict=False)):
        same = ("optimizers", "gathers")
        if any(ours[key] != theirs[key] for key in same) or set(ours["names"]) != set(theirs["names"]):
            return None
        for number in ours["optimizers"]:
            optimizers[number].zero_grad()
            sum(module.loss(rows_of(rank, index)) / 2 for rank in (0, 1)).backward()
            optimizers[number].step()
        metrics |= {name: sum(rows_of(rank, index).sum().item() for rank in (0, 1)) / 2 for name in ours["names"]}
        made += 1
        if asked_before(plans, index):
            break
    return parameters(module).tolist(), metrics, made


def asked_before(plans, index):
    """Whether an end that was asked for in this step or before is heard of in it: by what follows the asking."""
    for step in range(index + 1):
        if any(plan["steps"][step]["stops"] for plan in plans if step < len(plan["steps"])):
            # In the same step what was logged is reduced afterwards; in a later one anything is heard.
            heard = [bool(plans[0]["steps"][step]["names"])]
            heard += [_speaks(plans, later) for later in range(step + 1, index + 1)]
            if any(heard):
                return True
    return False


def _speaks(plans, step):
    plan = plans[0]["steps"][step]
    unsized = not all(plan["sized"] for plan in plans)
    return bool(plan["optimizers"] or plan["names"] or plan["gathers"] or unsized)
