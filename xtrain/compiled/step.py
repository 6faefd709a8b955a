"""``Trainer(compile="step")``: the training step as the loop calls it, recorded, compiled and replayed."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from xtrain.callbacks.progress import ProgressBar
from xtrain.compiled.batch import UnknownPartError, take_apart
from xtrain.compiled.building import Replay, compiled, functional
from xtrain.compiled.capture import captured
from xtrain.compiled.known import state_of
from xtrain.compiled.optimizers import Rates, keep_on_device
from xtrain.compiled.path import Path
from xtrain.compiled.recorded import Recorded, record
from xtrain.errors import ConfigurationError, ProtocolError, explain
from xtrain.guard import guard
from xtrain.run.automatic import AutomaticStep
from xtrain.run.state import Run

_LOG = logging.getLogger("xtrain")
MOST_PATHS = 8
_ATTEMPTS = 5  # recordings of steps in which state was made
_INSIDE = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")


def build(recorded: Recorded) -> Replay:
    """Return the operations of `recorded`: compiled by inductor on the CPU, in a CUDA graph on a GPU."""
    gm, inputs = functional(recorded.recording), recorded.recording.inputs
    on_host = all(tensor.is_cpu for tensor in inputs)
    return compiled(gm, inputs) if on_host else captured(gm, recorded)


class CompiledStep:
    """Runs training steps: the first ones for real, and recorded; later ones by replaying what was compiled.

    Args:
        run: whose step it is.
        training_step: takes ``(batch, batch_idx)``.
        require: raise where a step would run eagerly for good.

    Attributes:
        paths: the ways through the step that were seen.
        recordings: steps that ran for real and were written down.
        compilations: paths that were compiled.
        replays: steps that ran compiled.
        eager: steps that ran as without a compiler.
        seconds: time that recording and compiling took.
        reasons: why steps, or some of them, run eagerly.
    """

    def __init__(self, run: Run, training_step: Callable[..., Any], require: bool) -> None:
        self._run, self._training_step, self._require = run, training_step, require
        self.paths: list[Path] = []
        self.recordings = self.compilations = self.replays = self.eager = 0
        self.seconds = 0.0
        self.reasons: list[str] = []
        self._by_state: dict[str, list[Path]] = {}
        self._attempts, self._checked_epoch = 0, -1
        self._off = False
        self._rates: Rates | None = None
        self._states: list[Any] = []
        self._look_for_hooks()

    @property
    def ratio(self) -> float:
        """Time of replays over that of eager steps, of the path that is replayed most; NaN before it is known."""
        timed = [path for path in self.paths if path.replay is not None or path.decided]
        return max(timed, key=lambda path: len(path.times["replay"])).ratio if timed else float("nan")

    def __call__(self, batch: Any, batch_idx: int) -> Any:
        """Make one training step; returns what the user's step returns."""
        if self._off or self._run.life.toggles.active or not self._run.life.optimizers:
            return self._eagerly(batch, batch_idx)
        tensors: list[Tensor] = []
        try:
            state = repr((take_apart(batch, tensors), state_of(self._run)))
        except UnknownPartError as error:
            self._give_up(
                f"batches hold an object of type {error}; tensors, containers and plain values are understood"
            )
            return self._eagerly(batch, batch_idx)
        if len({id(tensor) for tensor in tensors}) != len(tensors):
            return self._eagerly(batch, batch_idx)
        self._renew()
        path = next((path for path in self._by_state.get(state, ()) if path.holds()), None)
        if path is None:
            return self._begin(state, batch, batch_idx, tensors)
        if path.reason:
            return self._eagerly(batch, batch_idx)
        if path.replay is None:
            return self._second(path, batch, tensors)
        if self._checked_epoch != self._run.trainer.progress.epoch:
            return self._check(path, batch, tensors)
        return self._choose(path, batch, batch_idx, tensors)

    def _eagerly(self, batch: Any, batch_idx: int) -> Any:
        self.eager += 1
        return self._training_step(batch, batch_idx)

    def _choose(self, path: Path, batch: Any, batch_idx: int, tensors: list[Tensor]) -> Any:
        """Replay a step; as long as it is not known whether that is faster, time both."""
        if path.decided:
            self.replays += 1
            return path.run(tensors)
        if path.next_kind == "eager":
            result = path.timed("eager", lambda: self._eagerly(batch, batch_idx))
        else:
            self.replays += 1
            result = path.timed("replay", lambda: path.run(tensors))
        if path.decided:
            self._decide(path)
        return result

    def _decide(self, path: Path) -> None:
        ratio = path.ratio
        if ratio <= 1.0 or self._require:
            _LOG.info("A compiled training step takes %.2f of the time of an eager one.", ratio)
            return
        path.reason, path.replay = f"a replay takes {ratio:.2f} of the time of an eager step", None
        self.reasons.append(path.reason)
        _LOG.info("Training steps run eagerly: %s.", path.reason)

    # ---------------------------------------------------------------- recording

    def _renew(self) -> None:
        """Forget everything if the optimizers hold other states than before: somebody has loaded them."""
        raw = [o.optimizer for o in self._run.life.optimizers]
        states = [held for o in raw for held in (o.state, o.param_groups, len(o.param_groups))]
        if self._rates is None or any(
            a is not b and a != b if type(a) is int else a is not b for a, b in zip(states, self._states, strict=True)
        ):
            keep_on_device(raw)
            self._rates, self._states = Rates(raw, self._run.backend.device), states
            self._by_state.clear()
            self.paths.clear()

    def _record(self, batch: Any, tensors: list[Tensor]) -> tuple[Any, Recorded]:
        assert self._rates is not None
        start = time.perf_counter()
        try:
            result, recorded = record(self._run, self._training_step, batch, tensors, self._rates)
        except BaseException as error:  # the user's, or the end of a batch that is to train nothing
            self._off = True
            self.reasons.append(f"a step raised {type(error).__name__}")
            raise
        finally:
            self.seconds += time.perf_counter() - start
        self.recordings += 1
        return result, recorded

    def _begin(self, state: str, batch: Any, batch_idx: int, tensors: list[Tensor]) -> Any:
        """Make a step of a way that was not seen before, and write it down."""
        if len(self.paths) >= MOST_PATHS:
            self._give_up(
                f"the step has more than {MOST_PATHS} ways, by the shapes of batches, by what is asked of batch_idx or "
                "by attributes that it reads; batches of one shape, or tensors instead of numbers, would help"
            )
            return self._eagerly(batch, batch_idx)
        result, recorded = self._record(batch, tensors)
        if recorded.fresh:  # it made the states of optimizers: these zeros are no part of another step
            self._attempts += 1
            if self._attempts > _ATTEMPTS:
                self._give_up("every step makes new parameters, buffers or states of optimizers")
            return result
        assert self._rates is not None
        path = Path(recorded, self._run, self._rates)
        self._by_state.setdefault(state, []).append(path)
        self.paths.append(path)
        self._refuse_problems(path, recorded)
        return result

    def _second(self, path: Path, batch: Any, tensors: list[Tensor]) -> Any:
        """Record a way for the second time; compile it if nothing but the data has changed."""
        result, recorded = self._record(batch, tensors)
        if self._refuse_problems(path, recorded):
            return result
        other = path.recorded.difference(recorded)
        if other is not None:
            self._refuse(path, f"two steps that should be alike are not: {other}; a number that Python computes anew "
                               "has to be a tensor")  # fmt: skip
            return result
        path.recorded = recorded
        self._compile(path)
        return result

    def _compile(self, path: Path) -> None:
        start = time.perf_counter()
        self._say("compiling")
        try:
            path.use(build(path.recorded))
            self.compilations += 1
        except Exception as error:  # whatever the compiler raises: the step was made, and goes on eagerly
            self._refuse(path, f"the compiler failed with {type(error).__name__}: {error!s:.300}")
        finally:
            self.seconds += time.perf_counter() - start

    def _say(self, text: str) -> None:
        for callback in self._run.trainer.callbacks:
            if isinstance(callback, ProgressBar):
                callback.say(text)

    def _check(self, path: Path, batch: Any, tensors: list[Tensor]) -> Any:
        """Make the first step of an epoch for real and compare it with what would have been replayed."""
        self._checked_epoch = self._run.trainer.progress.epoch
        result, recorded = self._record(batch, tensors)
        if self._refuse_problems(path, recorded):
            return result
        other = path.recorded.difference(recorded)
        if other is not None:
            epoch = self._run.trainer.progress.epoch
            raise ProtocolError(
                explain(
                    "a training step that does what its recording did",
                    f"in the first step of epoch {epoch} {other}; replays before it may be wrong",
                    "Trainer(compile=None); or make what changes a tensor, or an attribute of self",
                )
            )
        return result

    # ---------------------------------------------------------------- giving up

    def _refuse_problems(self, path: Path, recorded: Recorded) -> bool:
        if recorded.problems:
            self._refuse(path, str(recorded.problems[0]))
        return bool(recorded.problems)

    def _refuse(self, path: Path, reason: str) -> None:
        path.reason, path.replay = reason, None
        self._tell(reason)

    def _give_up(self, reason: str) -> None:
        self._off = True
        self._tell(reason)

    def _tell(self, reason: str) -> None:
        if self._require:
            fix = "Trainer(compile='step') runs such steps eagerly"
            raise ConfigurationError(explain("a training step that can be compiled", reason, fix))
        if reason not in self.reasons:
            self.reasons.append(reason)
            warnings.warn(f"Training steps run eagerly: {reason}", UserWarning, stacklevel=5)

    def _look_for_hooks(self) -> None:
        hooks = self._run.life.hooks
        for name in _INSIDE:
            if any(not isinstance(getattr(hook, "__self__", None), AutomaticStep) for hook in hooks[name]):
                self._give_up(f"{name} runs inside of the step, and a replay would not call it")
        for optimizer in self._run.life.optimizers:
            raw = optimizer.optimizer
            hooks_of_it = (*raw._optimizer_step_pre_hooks.values(), *raw._optimizer_step_post_hooks.values())
            if any(getattr(hook, "__module__", "") != guard.__module__ for hook in hooks_of_it):
                self._give_up(f"{optimizer!r} has hooks of its own, and a replay would not call them")
