"""One DeepSpeed engine per optimizer, and the life of its gradients.

Gradients stay whole and local, on the parameters, until they are finalized. Only then DeepSpeed
reduces them, once, into the shards that its optimizer steps on. So a gradient that strays into the
parameters of another optimizer costs nothing, may be accumulated, and may be dropped, on every stage.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from xtrain.collectives import Collectives
from xtrain.contract import OptimizerHandle
from xtrain.errors import ConfigurationError, explain

from .gradients import fill, requiring_grad
from .layout import read_groups

_LOG = logging.getLogger("xtrain")


class ParameterContainer(nn.Module):
    """What DeepSpeed takes for the model: the parameters of one optimizer, and no submodules.

    Args:
        named: parameters by their name in the user's module.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in named.items():
            self.register_parameter(name.replace(".", "__"), parameter)


def make_engine(model: nn.Module, config: dict[str, Any], optimizer: Optimizer | None = None) -> Any:
    """Return a DeepSpeed engine on the process group that exists.

    Raises:
        ConfigurationError: with what DeepSpeed says, if it cannot make one of these settings.
    """
    import deepspeed

    try:
        with _broadcastable(model):
            return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    except Exception as error:  # assertions, pydantic's, its own, and mistakes of its own
        received = f"{type(error).__name__}: {error}, for {config}"
        fix = "leave the setting out, or give it a value that fits the device and the number of processes"
        raise ConfigurationError(explain("settings that DeepSpeed can make an engine of", received, fix)) from error


@contextmanager
def _broadcastable(model: nn.Module) -> Iterator[None]:
    """Let DeepSpeed start with parameters without dimensions, which it cannot broadcast as bytes.

    On stage 3 they get a dimension for that moment, elsewhere they are left out: autograd would not
    forget the dimension, and xtrain has already sent every rank the same parameters.
    """
    parameters: list[Any] = [p for p in model.parameters() if p.dim() == 0 and not hasattr(p, "ds_id")]
    whole = isinstance(model, ParameterContainer)
    for parameter in parameters:
        if whole:
            parameter.ds_optim_param = True
        else:
            parameter.data = parameter.data.view(1)
    try:
        yield
    finally:
        for parameter in parameters:
            if whole:
                del parameter.ds_optim_param
            else:
                parameter.ds_shape = torch.Size()


class OptimizerEngine:
    """Reduces, clips and steps the gradients of one optimizer.

    Args:
        optimizer: the user's; above stage 0 DeepSpeed puts its shards into the groups.
        named: the parameters of `optimizer` by name.
        config: a DeepSpeed configuration for this engine alone.
        collectives: of the run.
        device: of this process.

    Attributes:
        parameters: those that train.
        every_parameter: those and the frozen ones.
        layout: the groups of the optimizer as the user made them.
        gradients: what was finalized, by position; this rank's part of it above stage 0.
        leftover: the gradients of the last step, until they are zeroed. They count in the next
            step, as in plain PyTorch.
    """

    def __init__(
        self,
        optimizer: OptimizerHandle,
        named: Mapping[str, nn.Parameter],
        config: dict[str, Any],
        collectives: Collectives,
        device: torch.device,
    ) -> None:
        self.parameters = [p for p in named.values() if p.requires_grad]
        self._names, self._told = [name for name, p in named.items() if p.requires_grad], False
        self._optimizer = optimizer
        self.every_parameter = list(named.values())
        self._frozen = [p for p in named.values() if not p.requires_grad]
        self.stage: int = config["zero_optimization"]["stage"]
        self.gradients: dict[int, Tensor] | None = None
        self.leftover: dict[int, Tensor] | None = None
        self._overflowed: Tensor | None = None
        self._collectives, self._device = collectives, device
        self._raw = optimizer.optimizer
        self.layout = read_groups(self._raw.param_groups, {p: name for name, p in named.items()})
        self.engine = make_engine(ParameterContainer(named), config, self._raw)
        self._groups = len(self._raw.param_groups)  # DeepSpeed has dropped the empty ones
        self.zero = self.engine.optimizer
        self._offloaded = self.stage > 0 and bool(
            self.zero.cpu_offload if self.stage < 3 else self.zero.offload_optimizer
        )
        for hook in getattr(self.zero, "_grad_acc_hooks", ()):  # they would reduce during backward
            hook.remove()
        self._data = [p.data for p in self.parameters] if self.stage in (1, 2) else []

    @property
    def has_gradients(self) -> bool:
        """Whether a step would have anything to work on."""
        held = self.gradients is not None or self.leftover is not None
        return held or any(p.grad is not None for p in self.parameters)

    def zero_grad(self, set_to_none: bool) -> None:
        """Drop what was accumulated, finalized, or left by the last step."""
        had = self.gradients is not None or self.leftover is not None
        filled = [p for p in self.parameters if had or p.grad is not None]
        self._drop_finalized()
        self.leftover = None
        for parameter in self.parameters:
            parameter.grad = None
        if not set_to_none:
            for parameter in filled:
                fill(parameter)

    def _drop_finalized(self) -> None:
        if self.gradients is None:
            return
        self.gradients = self._overflowed = None
        zero = self.zero
        if self.stage == 0:
            return
        zero.zero_grad(set_to_none=True)
        if self.stage == 3:
            zero.averaged_gradients = {}
            return
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        zero.micro_step_id = -1
        if self._offloaded:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()

    def finalize(self, scale: float | None, anywhere: bool) -> None:
        """Average the gradients over the ranks into shards, and take the loss scale off.

        Args:
            scale: the loss scale, or None without one.
            anywhere: whether any rank has a gradient; where there is none, it counts as zero.
        """
        self._check_unchanged()
        if not anywhere:
            return
        leftover = self.leftover
        if leftover is not None and self.stage:  # in buffers that DeepSpeed reuses
            leftover = {i: g.clone() for i, g in leftover.items()}
        self._reduce()
        self.leftover, self.gradients = None, self._shards()
        if scale is not None:
            self._overflowed = torch.zeros(1, device=self._device)
            self._unscale(1.0 / scale)
        if leftover is not None:
            self._add(leftover)
        if self._overflowed is not None and self.stage:
            self._overflowed = self._collectives.all_reduce(self._overflowed, "max", met=True)

    def _check_unchanged(self) -> None:
        """Refuse to step on part of what the user means: DeepSpeed fixed its shards at set-up."""
        unfrozen = sum(p.grad is not None for p in self._frozen)
        added = len(self._raw.param_groups) - self._groups
        replaced = self._optimizer.optimizer is not self._raw
        if unfrozen or added or replaced:
            received = f"{unfrozen} parameter(s) unfrozen and {added} group(s) added since"
            received = f"another {type(self._optimizer.optimizer).__name__} in its place" if replaced else received
            fix = "do it in configure_optimizers, or before a second trainer.fit(...)"
            expected = f"{self._optimizer!r} to train the parameters it had when fit() began"
            raise ConfigurationError(explain(expected, received, fix))

    def _reduce(self) -> None:
        if self.stage == 0 and self._collectives.world_size == 1:
            return
        self._tell_of_momentum()
        with requiring_grad(self.parameters):
            for parameter in self.parameters:
                # Every rank must reduce the same list; stage 3 would take the previous step's.
                if parameter.grad is None:
                    fill(parameter)
                elif parameter.grad.is_sparse:  # shards are slices of a dense buffer
                    parameter.grad = parameter.grad.to_dense()
            if self.stage == 0:
                self._average()
            else:
                self._clean_buffers()
                with self.engine.coalesce_grad_reduction():
                    pass

    def _tell_of_momentum(self) -> None:
        """Say once that what no loss reached moves all the same, by the moments of earlier steps."""
        missing = [name for name, p in zip(self._names, self.parameters, strict=True) if p.grad is None]
        if self._told or not self.stage or len(missing) in (0, len(self.parameters)):
            return
        if any(self._raw.state.values()):
            self._told = True
            expected = f"a gradient for every parameter of {self._optimizer!r}, which DeepSpeed steps on in one piece"
            fix = "an optimizer for each part that is trained apart, or DeepSpeed(stage=0)"
            received = f"none for {', '.join(missing[:3])} in this step; momentum moves them"
            _LOG.warning(explain(expected, received, fix))

    def _clean_buffers(self) -> None:
        """Zero the buffers that DeepSpeed reuses: a NaN in their padding would stay for ever."""
        if self._offloaded:
            for master in self.masters():
                if master.grad is not None:
                    master.grad.zero_()
        if self.stage == 3:
            self.zero.grad_partitions_flat_buffer.zero_()

    def masters(self) -> list[Tensor]:
        """Return what DeepSpeed steps on above stage 0: this rank's flat shards."""
        zero = self.zero
        masters = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        return list(masters)

    def _average(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = self._collectives.all_reduce(torch.cat([g.flatten() for g in gradients]), "mean", met=True)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _shards(self) -> dict[int, Tensor]:
        """Return the finalized gradients where DeepSpeed will step on them."""
        zero = self.zero
        if self.stage == 0:
            return {i: p.grad for i, p in enumerate(self.parameters) if p.grad is not None}
        if self._offloaded:
            return {i: master.grad for i, master in enumerate(self.masters()) if master.grad is not None}
        parts = (getattr(held, "grad_buffers", held) for held in zero.averaged_gradients.values())
        return dict(enumerate(part for held in parts for part in held))

    def _unscale(self, factor: float) -> None:
        assert self.gradients is not None
        assert self._overflowed is not None
        inverse = torch.full((1,), factor, device=self._device)
        torch._amp_foreach_non_finite_check_and_unscale_(list(self.gradients.values()), self._overflowed, inverse)

    def _add(self, leftover: dict[int, Tensor]) -> None:
        assert self.gradients is not None
        for index, old in leftover.items():
            if index in self.gradients:
                self.gradients[index].add_(old)
            else:  # stage 0, and no backward reached this parameter since
                self.parameters[index].grad = self.gradients[index] = old
        if self._overflowed is not None:
            self._unscale(1.0)

    def clip(self, value: float, algorithm: str) -> Tensor:
        """Clip the finalized gradients; return their total 2-norm before."""
        assert self.gradients is not None
        shards = list(self.gradients.values())
        norms = torch._foreach_norm(shards, 2, dtype=torch.float32)
        squares = torch.stack(norms).square().sum().to(self._device)
        if self.stage:
            squares = self._collectives.all_reduce(squares, "sum")
        norm = squares.sqrt()
        if algorithm == "value":
            torch._foreach_clamp_min_(shards, -value)
            torch._foreach_clamp_max_(shards, value)
        else:
            factor = (value / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(shards, factor.to(shards[0].device))
        return norm

    def step(self) -> bool:
        """Let DeepSpeed step on the finalized gradients; return whether it did."""
        self.overflowed = self._overflowed is not None and bool(self._overflowed.item())
        used = self.gradients
        if self.overflowed:
            self._drop_finalized()
        else:
            self.adopt_writes()
            self.engine.step()
        for parameter in self.parameters:
            parameter.grad = None
        self.leftover, self.gradients, self._overflowed = used, None, None
        return not self.overflowed and bool(self.engine.was_step_applied())

    @torch.no_grad()
    def adopt_writes(self) -> None:
        """Take what the user wrote into the parameters into the copies that DeepSpeed steps on.

        Without it a clamped or loaded weight would silently be lost in the next step.
        """
        for parameter, data in zip(self.parameters, self._data, strict=bool(self._data)):
            if parameter.data_ptr() != data.data_ptr():  # p.data = ... took it out of DeepSpeed's flat buffer
                data.copy_(parameter.data)
                parameter.data = data
        for working, master in self.copies():
            if working.dtype == master.dtype:
                master.data.copy_(working)
            else:  # where nothing was written, the master has more digits
                same = master.to(working.device, working.dtype) == working
                master.data.copy_(torch.where(same.to(master.device), master, working.to(master.device, master.dtype)))

    def copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the module computes with and what DeepSpeed steps on, in pairs."""
        zero = self.zero
        if self.stage == 3:
            yield from zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True)
        elif self.stage:
            parts = (group[self._collectives.rank] for group in zero.parallel_partitioned_bit16_groups)
            yield from zip(parts, zero.single_partition_of_fp32_groups, strict=True)
        else:
            for group, masters in zip(getattr(zero, "fp16_groups", ()), getattr(zero, "fp32_groups", ()), strict=True):
                yield from zip(group, masters, strict=True)

    def destroy(self) -> None:
        """Give back what DeepSpeed holds."""
        del self._raw.param_groups[self._groups :]  # groups that came later are not in its lists
        self.engine.destroy()
