"""The ``fsdp`` backend: parameters, gradients and optimizer state in shards, by PyTorch's FSDP2."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

from xtrain.contract import Capabilities, OptimizerHandle, Phase
from xtrain.errors import ConfigurationError, explain
from xtrain.launch.join import current_launch
from xtrain.layouts import Layout
from xtrain.memory import Memory, memory_of
from xtrain.on_cpu import OnCPU
from xtrain.scaler import LossScaler
from xtrain.tensors import map_tensors

from ..eager.averaging import agree, average, state_of
from ..eager.backend import EagerBackend
from ..eager.process_group import join_processes
from ..eager.replicas import check_module
from .gradients import Part, clip, split, total_norm
from .groups import LayerGroup, ShardedParameter, local, missing_names
from .launcher import agreed_options
from .mesh import make_mesh, read_mesh
from .options import check_choice, read_mixed
from .outside import ExplainsShards
from .passes import Passes
from .pending import wait_for_reduction, wait_no_more
from .policy import Policy, check_policy
from .rules import RULES, mixes
from .sharding import ShardedModule
from .state import load_training_state, training_state
from .whole import WholeStep, looks_at_whole


@final
class FSDP(EagerBackend):
    """Trains models that one device cannot hold: each network of the module in shards, layer by layer.

    Gradients stay whole and local until they are clipped or stepped; then they are reduced once.

    Args:
        reduce: ``"finalize"``, or ``"backward"``, where FSDP2 reduces in every backward, overlapped with it:
            less memory for gradients, but no gradient of a gradient.
        shard: what is gathered together: ``"layers"`` (default), the items of each network's lists and sequences
            (its children, where it has none); ``"children"``, each child network of the module as one;
            or a function of name and module that says what is a group.
        mesh: ``{"data": n, "fsdp": m}``, parameters in m shards, n times; ``{"data": n}`` shards nothing.
        replicate: the n of the mesh alone: hybrid sharding.
        offload: ``"cpu"`` keeps shards, and optimizer state, in the memory of the host.
        mixed: dtypes by use, ``{"param": "bfloat16", "reduce": "float32"}``; in place of autocast.
        methods: what uses a network's parameters beside its forward: ``["vae.encode", "vae.decode"]``.
        device: ``"cpu"`` rehearses on a machine with GPUs; default: the GPU of this process, if there is one.
        broadcast_start: see `EagerBackend`.
        timeout: see `EagerBackend`.

    Raises:
        ConfigurationError: for an option that means nothing.
    """

    name = "fsdp"
    layouts = (
        Layout(parameters=True, state=True),
        Layout("backend_options={'reduce': 'backward'}", parameters=True, state=True, gradients=True),
    )
    capabilities = Capabilities(
        precisions=frozenset({"32-true", "16-mixed", "bf16-mixed", "bf16-true"}),
        multi_process=True,
        inference_mode=False,  # whole parameters are made once, and those made there could never train
    )
    rules = RULES
    on_cpu = OnCPU(options={"device": "cpu"})

    def __init__(
        self,
        reduce: Literal["finalize", "backward"] = "finalize",
        shard: Policy | None = None,
        mesh: Mapping[str, int] | None = None,
        replicate: int | None = None,
        offload: str | None = None,
        mixed: Mapping[str, str | torch.dtype] | None = None,
        methods: Sequence[str] = (),
        device: str | None = None,
        broadcast_start: bool = True,
        timeout: float = 600.0,
    ) -> None:
        super().__init__(broadcast_start, timeout)
        check_choice("reduce", reduce, ("finalize", "backward"))
        check_choice("offload", offload, (None, "cpu"))
        check_choice("device", device, (None, "cpu", "cuda"))
        asked = {"shard": shard, "offload": offload, "device": device, "replicate": replicate}
        agreed = agreed_options(asked, os.environ)
        self.offload, self._wanted_device = agreed["offload"], agreed["device"]
        self.shard: Policy = agreed["shard"] or "layers"
        check_policy(self.shard)
        self.reduce, self.methods = reduce, tuple(methods)
        self.axes, self.mixed = read_mesh(mesh, agreed["replicate"]), read_mixed(mixed)
        self._sharded: ShardedModule | None = None
        self._names: dict[nn.Module, str] = {}
        self._parameter_names: dict[Tensor, str] = {}
        self._passes = Passes((), reduced_in_backward=False)

    # ---------------------------------------------------------------- start-up

    @classmethod
    def available(cls) -> str | None:
        missing = missing_names()
        if missing:
            return f"torch {torch.__version__} lacks {', '.join(missing)}; pip install 'torch>=2.9,<2.14'"
        return None

    def launch(self) -> None:
        if self.mixed and self.precision.name != "32-true":
            received = f"mixed={self.mixed} and precision={self.precision.name!r}, which casts the same tensors"
            fix = "Trainer(precision='32-true', backend=FSDP(mixed=...)), or the precision alone"
            raise ConfigurationError(explain("one policy of dtypes", received, fix))
        on_gpu = self._wanted_device == "cuda" or (self._wanted_device is None and torch.cuda.is_available())
        self.device = torch.device("cuda", current_launch().local_rank) if on_gpu else torch.device("cpu")
        if on_gpu:
            torch.cuda.set_device(self.device)
        kind: Literal["gloo", "nccl"] = "nccl" if on_gpu else "gloo"
        self.collectives = join_processes(kind, self.device, devices=self.devices, always=True, timeout=self.timeout)
        self._replicated = self.collectives.world_size > 1
        self.collectives.equal_forwards = True  # each gathers parameters

    def setup_module(self, module: nn.Module) -> None:
        if self._replicated:
            check_module(module, self.collectives, self.broadcast_start)
        dtype = self.precision.parameter_dtype
        if dtype is not None:
            module._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        mesh = make_mesh(self.axes, self.device.type, self.collectives.world_size)
        self._ranks = mesh.get_group("fsdp")
        pinned = self.device.type != "cpu"
        offload = CPUOffloadPolicy(pin_memory=pinned) if self.offload == "cpu" else OffloadPolicy()
        mixed = MixedPrecisionPolicy(**self.mixed)
        self._sharded = ShardedModule(module, mesh, self.device, self.shard, mixed, offload, self.methods)
        self._names = {part: name for name, part in module.named_modules()}
        self._parameter_names = {parameter: name for name, parameter in module.named_parameters()}
        self._passes = Passes(self._sharded.groups, self.reduce == "backward")
        for group in self._sharded.groups if self._replicated else ():
            group.announce(self.collectives.meet)

    def setup_optimizers(self, module: nn.Module, optimizers: Sequence[OptimizerHandle]) -> None:
        super().setup_optimizers(module, optimizers)
        for optimizer in optimizers:
            if mixes(optimizer.optimizer):  # one call for parameters of both kinds would fail
                for group in optimizer.optimizer.param_groups:
                    group.update({"foreach": False} if "foreach" in group else {})

    def teardown(self) -> None:
        if self._sharded is not None:
            wait_no_more(self._sharded.by_shard)
            self._sharded.restore([o.optimizer for o in self._optimizers])
        self._sharded, self._passes = None, Passes((), reduced_in_backward=False)
        self._names, self._parameter_names = {}, {}

    # ---------------------------------------------------------------- the life of a gradient

    def _in_shards(self, optimizer: OptimizerHandle) -> list[tuple[LayerGroup, ShardedParameter]]:
        known = {} if self._sharded is None else self._sharded.by_shard
        return [known[p] for p in optimizer.parameters if p in known]

    def _reduced_with(self, optimizer: OptimizerHandle) -> list[tuple[LayerGroup, ShardedParameter, bool]]:
        """Return the parameters of the layers of `optimizer`, each with whether its gradient is wanted now.

        Optimizers that share a layer share its reduction; averages are linear, so one that accumulates on adds
        to it later. Not wanted is what another has finalized already, and what nobody trains.
        """
        trained = {p for o in self._optimizers if o is optimizer or o.phase is Phase.ACCUMULATED for p in o.parameters}
        groups = dict.fromkeys(group for group, _ in self._in_shards(optimizer))
        return [(group, p, p.sharded in trained) for group in groups for p in group.parameters]

    def _plain(self, optimizer: OptimizerHandle) -> list[Tensor]:
        known = {} if self._sharded is None else self._sharded.by_shard
        return [p for p in optimizer.parameters if p not in known]

    def zero_grad(self, optimizer: OptimizerHandle, set_to_none: bool = True) -> None:
        super().zero_grad(optimizer, set_to_none)
        wait_no_more(p.sharded for _, p in self._in_shards(optimizer))
        for _, parameter in self._in_shards(optimizer):
            if set_to_none:
                parameter.take_local_gradient()
            else:
                parameter.zero_local_gradient()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if "inputs" in kwargs:
            kwargs["inputs"] = self._leaves(_listed(kwargs["inputs"]))
        names = ("retain_graph", "create_graph")
        retain, create = (bool(kwargs.get(name) or (args[i : i + 1] or [False])[0]) for i, name in enumerate(names, 1))
        for _, parameter in [] if self._sharded is None else self._sharded.by_shard.values():
            parameter.pass_on_hooks()
        if self._replicated:
            self._passes.meet(
                loss, lambda facts: agree(facts, f"run a backward ({len(facts)} facts)", self.collectives)
            )
        with self._passes.backward(create, retain):
            super().backward(loss, *args, **kwargs)
        if self.reduce == "backward":
            for group in self._passes.groups:
                group.part_versions()
        elif self._sharded is not None:
            waiting = [p.sharded for _, p in self._sharded.by_shard.values() if p.local_gradient is not None]
            wait_for_reduction(waiting, self._parameter_names)

    def _leaves(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        known = {} if self._sharded is None else self._sharded.by_shard
        return [known[p][1].whole if p in known else p for p in parameters]

    def check_replicas(self, module: nn.Module) -> None:
        """Compare nothing: shards differ by design."""

    def leaves_of(self, optimizer: OptimizerHandle) -> list[Tensor]:
        return self._leaves(optimizer.parameters)

    def average_gradients(self, optimizer: OptimizerHandle) -> None:
        reduced = [] if self.reduce == "backward" else self._reduced_with(optimizer)
        plain = self._plain(optimizer)
        facts = [int(wanted and p.local_gradient is not None) for _, p, wanted in reduced]
        facts += [state_of(p) for p in plain]
        if self._replicated:
            facts = self._agree(optimizer, facts)
            average(plain, facts[len(reduced) :], self.collectives.world_size)
        together: dict[LayerGroup, list[ShardedParameter]] = {}
        for (group, parameter, _), exists in zip(reduced, facts, strict=False):
            if exists:
                together.setdefault(group, []).append(parameter)
        ends = [group.start_reduction(parameters) for group, parameters in reversed(together.items())]
        for end in ends:
            end()
        wait_no_more(p.sharded for parameters in together.values() for p in parameters)

    def unscale_gradients(self, scaler: LossScaler, optimizer: OptimizerHandle) -> None:
        found = scaler.unscale(optimizer)
        if not found:  # on no rank: they agreed on which gradients there are
            return
        everywhere = self.collectives.all_reduce(torch.stack([flag.cpu() for flag in found]).max(), "max", met=True)
        found[:] = [everywhere]

    def scaled_gradients(self, optimizer: OptimizerHandle) -> Iterable[Any]:
        known = {} if self._sharded is None else self._sharded.by_shard
        for parameter in optimizer.parameters:
            own = known[parameter][1].local_gradient if parameter in known else None
            if own is not None:
                yield Part(own)
            if parameter in known and parameter.grad is not None:
                yield Part(local(parameter.grad))
            elif parameter.grad is not None:
                yield parameter

    def clip_gradients(self, optimizer: OptimizerHandle, value: float, algorithm: Literal["norm", "value"]) -> Tensor:
        parts, whole = split(optimizer.parameters)
        self.collectives.meet(f"clip the gradients of {optimizer!r}")
        norm = total_norm(parts, whole, self._ranks, self.device)
        clip([*parts, *whole], norm, value, algorithm)
        return norm

    def step(
        self, optimizer: OptimizerHandle, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> tuple[Any, bool]:
        if looks_at_whole(optimizer.optimizer):
            whole = WholeStep(optimizer.optimizer, [p.sharded for _, p in self._in_shards(optimizer)])
            step = super().step
            done: tuple[Any, bool] = whole.run(lambda evaluate: step(optimizer, evaluate, **kwargs), closure)
        else:
            done = super().step(optimizer, closure, **kwargs)
        self._passes.let_go()
        for group, parameter in self._in_shards(optimizer):
            group.release()
            parameter.note_step()
        return done

    def step_boundary(self) -> None:
        self._passes.release()
        super().step_boundary()

    # ---------------------------------------------------------------- where FSDP differs

    def forward_context(self) -> AbstractContextManager[Any]:
        return ExplainsShards(super().forward_context(), self._names)

    def to_cpu(self, data: Any) -> Any:
        """Return `data` whole, as copies on the CPU; every rank must call it where shards are in it."""
        return map_tensors(lambda t: _gathered(t.detach()).to("cpu", copy=True), data)

    def full_parameters(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Gather `module`; what is written to its parameters inside lasts. Every rank must enter it."""
        return nullcontext() if self._sharded is None else self._sharded.full_parameters(module)

    def training_state(
        self, module: nn.Module, optimizers: Sequence[OptimizerHandle], whole: bool = True
    ) -> dict[str, Any]:
        assert self._sharded is not None
        self._passes.release()
        return training_state(module, optimizers, self._sharded, whole, self.collectives.rank == 0)

    def load_training_state(
        self, module: nn.Module, optimizers: Sequence[OptimizerHandle], state: Mapping[str, Any]
    ) -> None:
        assert self._sharded is not None
        load_training_state(module, optimizers, state, self._sharded)

    def local_part(self, parameter: Tensor) -> Tensor:
        return local(parameter)

    def memory(self, module: nn.Module, optimizers: Sequence[OptimizerHandle]) -> Memory:
        whole = None if self.reduce == "backward" else Tensor.numel
        return memory_of(module, optimizers, lambda p: local(p).numel(), whole)

    def has_gradients(self, optimizer: OptimizerHandle) -> bool:
        if super().has_gradients(optimizer):
            return True
        return any(p.local_gradient is not None for _, p in self._in_shards(optimizer))

    def gradient_versions(self, optimizer: OptimizerHandle) -> list[Any]:
        plain = [None if p.grad is None else (id(p.grad), p.grad._version) for p in self._plain(optimizer)]
        return [*plain, *(p.versions for _, p in self._in_shards(optimizer))]

    def unseen_gradient(self) -> str | None:
        scaled = [] if self.scaler is None else ["the loss scale"]
        return " and ".join(["the reduction into shards", *scaled])


def _listed(inputs: Any) -> list[Tensor]:
    return [inputs] if isinstance(inputs, Tensor) else list(inputs)


def _gathered(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
