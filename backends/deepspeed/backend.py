"""The ``deepspeed`` backend: ZeRO 0 to 3, one engine per optimizer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from xtrain.checkpoint import named
from xtrain.checks import check_timeout
from xtrain.contract import Capabilities, OptimizerHandle
from xtrain.errors import ConfigurationError, ProtocolError, explain
from xtrain.launch.join import current_launch
from xtrain.layouts import Layout
from xtrain.memory import Memory, memory_of
from xtrain.on_cpu import OnCPU
from xtrain.tensors import move_module

from ..eager.process_group import join_processes, random_stream
from ..eager.replicas import check_module, check_optimizers
from ..eager.scaling import ScalingBackend
from .config import check_precision, engine_config, read_config
from .engine import OptimizerEngine
from .gradients import give_gradient
from .rules import RULES
from .sharding import Attachments, ShardedModule, parts_of
from .state import EngineState


@final
class DeepSpeed(ScalingBackend):
    """Trains with DeepSpeed: each optimizer of ``configure_optimizers`` becomes an engine of its own.

    The module stays the user's and is called directly. Gradients are whole and local until they are
    clipped or stepped; optimizer state (stage 1 and up) and parameters (stage 3) are partitioned.

    Args:
        stage: ZeRO stage, 0 to 3; default: the `config`'s, else 2.
        offload_optimizer: where optimizer state lives: ``"cpu"``, a dict of DeepSpeed's options, or None
            for the device.
        offload_param: as `offload_optimizer`, for the parameters of stage 3.
        config: a DeepSpeed configuration, as a dict or the path of a JSON file. What xtrain or the
            Trainer owns (accumulation, clipping, precision, batch size) may be left out, ``"auto"``,
            or agree.
        timeout: seconds that a process waits for the others before it gives up.

    Raises:
        ConfigurationError: for what DeepSpeed would ignore, misread or do twice.
    """

    name = "deepspeed"
    layouts = (
        Layout("backend_options={'stage': 0}"),
        Layout("backend_options={'stage': 2}", state=True, masters=True),
        Layout("backend_options={'stage': 3}", parameters=True, state=True),
    )
    capabilities = Capabilities(
        precisions=frozenset({"32-true", "16-mixed", "bf16-mixed", "bf16-true"}),
        reevaluating_closures=False,
        shared_parameters=False,
        editable_gradients=False,  # they are in its own shards
        multi_process=True,
    )
    rules = RULES
    on_cpu = OnCPU({"DS_ACCELERATOR": "cpu"})

    def __init__(
        self,
        stage: int | None = None,
        offload_optimizer: str | Mapping[str, Any] | None = None,
        offload_param: str | Mapping[str, Any] | None = None,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        timeout: float = 600.0,
    ) -> None:
        given = {"stage": stage, "offload_optimizer": offload_optimizer, "offload_param": offload_param}
        self.config = read_config(given, config, os.environ)
        self.stage: int = self.config["zero_optimization"]["stage"]
        self.timeout = check_timeout(timeout, "DeepSpeed")
        self._engines: dict[OptimizerHandle, OptimizerEngine] = {}
        self._sharded: ShardedModule | None = None
        self._attachments: Attachments | None = None

    # ---------------------------------------------------------------- start-up

    @classmethod
    def available(cls) -> str | None:
        if find_spec("deepspeed") is None:
            return "deepspeed is not installed; pip install 'xtrain-torch[deepspeed]'"
        wanted = os.environ.get("DS_ACCELERATOR")
        if wanted not in (None, "cpu", "cuda"):
            return f"DS_ACCELERATOR={wanted} is not supported here; export DS_ACCELERATOR=cuda, or cpu"
        if wanted == "cuda" and not torch.cuda.is_available():
            return "DS_ACCELERATOR=cuda, but no CUDA device is visible; export DS_ACCELERATOR=cpu"
        return None

    def launch(self) -> None:
        check_precision(self.config, self.precision)
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # the only device there is
        on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
        # DeepSpeed insists on this variable, also without any launcher.
        local_rank = int(os.environ.setdefault("LOCAL_RANK", str(current_launch().local_rank)))
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)
        if not on_cpu:
            torch.cuda.set_device(self.device)
        kind: Literal["gloo", "nccl"] = "gloo" if on_cpu else "nccl"
        self.collectives = join_processes(kind, self.device, devices=self.devices, always=True, timeout=self.timeout)
        self.collectives.equal_forwards = self.stage == 3  # each gathers parameters
        _start_deepspeed(kind, self.config["zero_optimization"])

    def setup_module(self, module: nn.Module) -> None:
        move_module(module, self.device, self.precision.parameter_dtype)
        if self.collectives.world_size > 1:
            check_module(module, self.collectives, broadcast_start=True)

    def setup_optimizers(self, module: nn.Module, optimizers: Sequence[OptimizerHandle]) -> None:
        self._start_scaler()
        names = {parameter: name for name, parameter in module.named_parameters()}
        owned = [_named(optimizer, names) for optimizer in optimizers]
        if self.collectives.world_size > 1:
            check_optimizers(module, optimizers, self.collectives)
        if not optimizers:
            return
        for parameter in module.parameters():
            if not parameter.is_contiguous():  # made by .t(), or channels_last: DeepSpeed copies bytes in a row
                parameter.data = parameter.data.contiguous()
        if self.stage:
            partitioned = [names] if self.stage == 3 else [{p: n for n, p in named.items()} for named in owned]
            _check_dtypes(partitioned, self.precision.parameter_dtype or torch.float32)
        self._attachments = Attachments(module)
        if self.stage == 3:
            self._sharded = ShardedModule(module, engine_config(self.config, names, self.precision))
        self._engines = {
            optimizer: OptimizerEngine(
                optimizer,
                named,
                engine_config(self.config, named.values(), self.precision),
                self.collectives,
                self.device,
            )
            for optimizer, named in zip(optimizers, owned, strict=True)
        }
        if self._sharded is not None:
            self._sharded.hold()

    def random_stream(self) -> AbstractContextManager[None]:
        return random_stream(self.collectives, self.device)

    def teardown(self) -> None:
        if self._sharded is not None:
            self._sharded.restore()
        for engine in self._engines.values():
            engine.destroy()
        if self._attachments is not None:
            self._attachments.restore()
        self._engines, self._sharded, self._attachments = {}, None, None

    # ---------------------------------------------------------------- the life of a gradient

    def zero_grad(self, optimizer: OptimizerHandle, set_to_none: bool = True) -> None:
        self._engines[optimizer].zero_grad(set_to_none)
        if self.scaler is not None:
            self.scaler.forget(optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        with self.precision.backward_context(self.device.type):
            if self._sharded is None:
                loss.backward(*args, **kwargs)
            else:
                retained = bool(kwargs.get("retain_graph") or kwargs.get("create_graph") or any(args[1:3]))
                self._sharded.backward(lambda: loss.backward(*args, **kwargs), retained)

    def finalize_gradients(self, optimizer: OptimizerHandle) -> None:
        engine = self._engines[optimizer]
        call = f"average the gradients of {optimizer!r}"
        anywhere = any(map(any, self.collectives.meet(call, bytes([engine.has_gradients]))))
        engine.finalize(None if self.scaler is None else self.scaler.current_scale, anywhere)
        if self.scaler is not None and engine.gradients is not None:
            self.scaler.note_unscaled(optimizer)

    def clip_gradients(self, optimizer: OptimizerHandle, value: float, algorithm: Literal["norm", "value"]) -> Tensor:
        return self._engines[optimizer].clip(value, algorithm)

    def step(
        self, optimizer: OptimizerHandle, closure: Callable[[], Any] | None = None, **kwargs: Any
    ) -> tuple[Any, bool]:
        if kwargs:
            expected = f"opt.step() without arguments of {type(optimizer.optimizer).__name__}: its engine steps"
            fix = "opt.param_groups[0][...] = ..., or a backend that steps the optimizer itself"
            raise ProtocolError(explain(expected, ", ".join(kwargs), fix))
        engine = self._engines[optimizer]
        if self._sharded is not None:
            self._sharded.release(engine.parameters)
        with self.precision.suspended(self.device.type):
            applied = engine.step()
        if self.scaler is not None:
            self.scaler.record(engine.overflowed)
            self.scaler.forget(optimizer)  # the gradients of the step are kept apart, and are no part of new ones
        if self._sharded is not None:
            self._sharded.hold()
        return None, applied

    def step_boundary(self) -> None:
        if self._sharded is not None:
            self._sharded.step_boundary()
        if self.scaler is not None:
            self.scaler.update(self._engines)

    # ---------------------------------------------------------------- where DeepSpeed differs

    def full_parameters(self, module: nn.Module) -> AbstractContextManager[Any]:
        """Gather `module` under ZeRO 3; what is written to its parameters inside lasts, on every stage."""
        return nullcontext() if self._sharded is None else self._gathered(self._sharded, module)

    @contextmanager
    def _gathered(self, sharded: ShardedModule, module: nn.Module) -> Iterator[None]:
        with sharded.gathered(module):
            yield
        for engine in self._engines.values():
            engine.adopt_writes()

    def training_state(
        self, module: nn.Module, optimizers: Sequence[OptimizerHandle], whole: bool = True
    ) -> dict[str, Any]:
        weights = named.copied(named.module_state(module), self._whole if whole else parts_of)
        states = {label: engine.read(whole) for label, engine in self._engine_states(optimizers).items()}
        gradients = named.copied(named.gradients(module, optimizers), self.to_cpu)
        if self.collectives.rank and whole:
            return {"gradients": gradients}
        return {"state_dict": weights, "optimizer_states": states, "gradients": gradients}

    def _whole(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return copies on the CPU of what is whole on this rank, on rank 0 also of what is not."""
        if self._sharded is not None:
            return self._sharded.copies(tensors, self.collectives.rank == 0)
        return self.to_cpu(tensors) if self.collectives.rank == 0 else tensors

    def _engine_states(self, optimizers: Sequence[OptimizerHandle]) -> dict[str, EngineState]:
        labels = named.names_of_optimizers(optimizers)
        pairs = zip(labels, optimizers, strict=True)
        return {label: EngineState(self._engines[o], o, label, self.collectives) for label, o in pairs}

    def load_training_state(
        self, module: nn.Module, optimizers: Sequence[OptimizerHandle], state: Mapping[str, Any]
    ) -> None:
        for label, engine in self._engine_states(optimizers).items():
            if label in state["optimizer_states"]:
                engine.load(state["optimizer_states"][label], state["state_dict"])
        self._load_gradients(module, state["gradients"])

    def _load_gradients(self, module: nn.Module, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        parameters = dict(module.named_parameters())
        for name, gradient in ((n, g) for held in saved.values() for n, g in held.items()):
            give_gradient(parameters[name], gradient)

    def parameters_of(self, optimizer: OptimizerHandle) -> list[Tensor]:
        engine = self._engines.get(optimizer)
        return super().parameters_of(optimizer) if engine is None else list(engine.every_parameter)

    def local_part(self, parameter: Any) -> Tensor:
        # ZeRO 3: what is held whole is written back into its shard before the next step on it.
        shard = getattr(parameter, "ds_tensor", None)
        return parameter if shard is None or parameter.numel() else shard  # type: ignore[no-any-return]

    def elements_of(self, parameter: Any) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    def memory(self, module: nn.Module, optimizers: Sequence[OptimizerHandle]) -> Memory:
        def masters(optimizer: Any) -> Sequence[Tensor] | None:
            engine = self._engines[optimizer]
            if engine.stage == 0:
                return [master for _, master in engine.copies()] or None
            return [master for master in engine.masters() if master.device.type == self.device.type]

        return memory_of(module, optimizers, lambda p: self.local_part(p).numel(), self.elements_of, masters)

    def has_gradients(self, optimizer: OptimizerHandle) -> bool:
        return self._engines[optimizer].has_gradients

    def unseen_gradient(self) -> str | None:
        return "the averaging over processes, the loss scale and the partitioned step of DeepSpeed"


def _start_deepspeed(kind: str, zero: dict[str, Any]) -> None:
    import deepspeed
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils import logger

    try:
        DeepSpeedZeroConfig(**zero)
    except ValueError as error:
        fix = "https://www.deepspeed.ai/docs/config-json/#zero-optimizations-for-fp16-training lists the keys"
        raise ConfigurationError(explain("zero_optimization as DeepSpeed reads it", str(error), fix)) from error

    logger.setLevel(logging.ERROR)
    # Communication through shared memory would compile an operator, for minutes, at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=kind, auto_mpi_discovery=False, verbose=False)


def _named(optimizer: OptimizerHandle, names: Mapping[Any, str]) -> dict[str, nn.Parameter]:
    named: dict[str, Any] = {}
    for parameter in optimizer.parameters:
        if parameter not in names:
            raise ConfigurationError(
                explain(
                    f"{optimizer!r} to hold parameters of the module, which DeepSpeed partitions",
                    f"a tensor of shape {tuple(parameter.shape)} that is not among module.parameters()",
                    "self.image = torch.nn.Parameter(image) in __init__, Adam([self.image]) in configure_optimizers",
                )
            )
        named[names[parameter]] = parameter
    return named


def _check_dtypes(partitioned: Iterable[Mapping[Any, str]], dtype: torch.dtype) -> None:
    for names in partitioned:
        for parameter, name in names.items():
            if parameter.dtype != dtype:
                raise ConfigurationError(
                    explain(
                        f"parameters of {dtype}, which DeepSpeed keeps together in flat buffers",
                        f"{name} of {parameter.dtype}",
                        "module.float() before the fit, or DeepSpeed(stage=0)",
                    )
                )
