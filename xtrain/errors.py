"""Every error xtrain raises on purpose.

All derive from `XTrainError` and from the built-in a caller would expect, so both
``except XTrainError`` and ``except ValueError`` work. Messages follow one pattern, built by
`explain`: what was expected, what came, and the corrected line.
"""

from __future__ import annotations

from collections.abc import Sequence


class XTrainError(Exception):
    """Base of all errors raised by xtrain.

    Example:
        >>> try:
        ...     Trainer(backend="cpo")
        ... except XTrainError as error:
        ...     print(type(error).__name__)
        UnknownBackendError
    """


class ConfigurationError(XTrainError, ValueError):
    """An argument, a return value or a module that cannot be used as it is.

    Example:
        >>> Trainer(max_epochs="ten")
        Traceback (most recent call last):
        xtrain.errors.ConfigurationError: Expected max_epochs as an int of at least -1. Received: 'ten'.
        Fix:  Trainer(max_epochs=1)
    """


class UnknownBackendError(ConfigurationError):
    """No backend is registered under the given name.

    Example:
        >>> Trainer(backend="cpo")
        Traceback (most recent call last):
        xtrain.errors.UnknownBackendError: Expected a backend out of ... 'cpu', 'cuda', ... Received: 'cpo'.
        Fix:  Trainer(backend='cpu')
    """


class MissingDependencyError(XTrainError, ImportError):
    """A backend or logger needs a package that is not installed; the message has the pip line.

    Example:
        >>> try:
        ...     writer = TensorBoardLogger("logs").experiment  # needs tensorboard
        ... except MissingDependencyError as error:
        ...     reason = str(error)  # ... pip install 'xtrain-torch[loggers]'
    """


class BackendUnavailableError(XTrainError, RuntimeError):
    """The backend's software or hardware is not usable on this machine.

    Example:
        >>> try:
        ...     Trainer("cuda", fast_dev_run=True).fit(module, data)
        ... except BackendUnavailableError as error:
        ...     reason = str(error)  # what is missing, and what to do about it
    """


class BackendContractError(XTrainError, TypeError):
    """A registered class does not fulfil the `Backend` contract.

    Example:
        >>> register_backend(int)
        Traceback (most recent call last):
        xtrain.errors.BackendContractError: Expected a subclass of xtrain.contract.Backend. Received: <class 'int'>.
        Fix:  class MyBackend(xtrain.contract.Backend): ...
    """


class ProtocolError(XTrainError, RuntimeError):
    """The life of a gradient was called in an order that would train something else.

    Example:
        >>> module.optimizers()  # outside of a run
        Traceback (most recent call last):
        xtrain.errors.ProtocolError: Expected optimizers() inside a run, where optimizers exist. ...
    """


class NonFiniteLossError(XTrainError, FloatingPointError):
    """A loss became NaN or infinite and the Trainer was told to stop.

    Example:
        >>> class Diverging(Regression):
        ...     def training_step(self, batch, batch_idx):
        ...         self.manual_backward(self.net(batch).sum() * float("inf"))
        >>> Trainer(max_epochs=1, nonfinite_loss="stop", enable_progress_bar=False).fit(Diverging(), data)
        Traceback (most recent call last):
        xtrain.errors.NonFiniteLossError: Expected a finite loss. Received: ...
    """


class LaunchError(XTrainError, RuntimeError):
    """The processes of a run could not be started, or did not find each other.

    Example:
        >>> try:
        ...     trainer.fit(module, data)
        ... except LaunchError as error:
        ...     print(error)  # Expected a free port. Received: MASTER_PORT=29500, in use ...
    """


class RankFailedError(XTrainError, RuntimeError):
    """Another process of the run failed; the message has its first error.

    Example:
        >>> try:
        ...     trainer.fit(module, data)
        ... except RankFailedError as error:
        ...     print(error)  # Rank 1 failed first: ..., with its traceback
    """


class CheckpointError(XTrainError, RuntimeError):
    """A checkpoint cannot be written, or is not what this run can go on from.

    Example:
        >>> try:
        ...     trainer.fit(module, data)
        ... except CheckpointError as error:
        ...     print(error)  # which file of which checkpoint, and what is wrong with it
    """


class UnsupportedCombinationError(XTrainError, RuntimeError):
    """Backend, precision, optimizers and flags do not go together.

    Attributes:
        violations: one text per violated rule, all of them, in the order of the rule table.

    Example:
        >>> try:
        ...     Trainer("cpu", precision="16-true", gradient_clip_val=1.0, max_epochs=1).fit(module, data)
        ... except UnsupportedCombinationError as error:
        ...     print(len(error.violations))  # the precision, and a flag that manual optimization leaves to the step
        2
    """

    def __init__(self, violations: Sequence[str]) -> None:
        self.violations = tuple(violations)
        count = len(self.violations)
        head = f"{count} unsupported combination{'s' if count > 1 else ''} (nothing was trained):"
        super().__init__("\n".join([head, *(f"  {i}. {v}" for i, v in enumerate(self.violations, 1))]))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return type(self), (self.violations,)  # how it travels between processes


def explain(expected: str, received: object, fix: str | None = None) -> str:
    """Return the message of an error: what was expected, what came, and the corrected line."""
    text = f"Expected {expected}. Received: {received}."
    return text if fix is None else f"{text}\nFix:  {fix}"


# What goes wrong in the life of a gradient, each with the line that is right.

LOSS = (
    "Expected a loss that is a tensor with one element and a graph. Received: {}.\n"
    "Fix:  self.manual_backward(criterion(self(x), y).mean())"
)
NOTHING_TO_STEP = (
    "Expected gradients of {optimizer} to step on. Received: none; nothing was done, as in PyTorch, and this is said "
    "once.\nFix:  self.manual_backward(loss) of a loss that reaches it, if it was meant to train here"
)
STEPPED_BETWEEN = (
    "every backward before a step changes the parameters that its forward used",
    "self.manual_backward(loss_a); self.manual_backward(loss_b); opt_a.step(); opt_b.step()",
)
CLIP_AFTER_STEP = (
    "Expected clip_gradients before step. Received: clip_gradients for {optimizer}, which has already stepped.\n"
    "Fix:  self.manual_backward(loss); self.clip_gradients(opt, gradient_clip_val=1.0); opt.step()"
)
BACKWARD_AFTER_CLIP = (
    "Expected every backward of {optimizer} before its gradients are clipped. Received: a manual_backward that "
    "added to clipped gradients, which this backend keeps apart from new ones.\n"
    "Fix:  self.manual_backward(loss_a); self.manual_backward(loss_b); self.clip_gradients(opt, 1.0); opt.step()\n"
    "      or keep the other loss away: with self.toggled_optimizer(other_opt): self.manual_backward(other_loss)"
)
UNSEEN = (
    "Expected gradients made by self.manual_backward(loss). Received: gradients of {optimizer} that came from "
    "elsewhere (loss.backward()?); they miss {lost}.\n"
    "Fix:  self.manual_backward(loss)"
)
EDITED = (
    "Expected the gradients of {optimizer} as manual_backward left them, until they are clipped or stepped. Received: "
    "gradients that were changed before (torch's clip_grad_norm_, p.grad = ..., loss.backward()?), while they still "
    "miss {lost}.\nFix:  {fix}"
)
NOT_IN_GRAD = (
    "Expected a backend whose finalized gradients are in .grad. Received: opt.finalize() for {optimizer} on backend "
    "{backend!r}, which keeps them elsewhere.\n"
    "Fix:  self.clip_gradients(opt, gradient_clip_val=1.0); opt.step()"
)
OWN_METHOD = (
    "Expected true gradients before {optimizer} steps by a method of its own. Received: opt.{name}(...), whose "
    "gradients would miss {lost}.\nFix:  {fix}"
)
RAW_STEP = (
    "Expected opt.step() of a LightningOptimizer. Received: a step of the raw {optimizer}, whose gradients would "
    "miss {lost}.\n"
    "Fix:  opt = self.optimizers(); opt.step()"
)
