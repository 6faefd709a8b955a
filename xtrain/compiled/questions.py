"""Numbers of the loop that note what Python asks of them, so that a step is replayed only where the answers hold."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from xtrain.run.progress import Progress

Expression = Callable[[Progress], Any]


class Answers:
    """What was asked of the numbers of one step, and what they answered."""

    def __init__(self) -> None:
        self._asked: list[tuple[Expression, Any]] = []

    def note(self, question: Expression, answer: Any) -> None:
        """Add a question about the place in the training."""
        self._asked.append((question, answer))

    def hold(self, progress: Progress) -> bool:
        """Return whether every question has the same answer at `progress`."""
        return all(question(progress) == answer for question, answer in self._asked)


class WatchedInt(int):
    """An int whose comparisons and conversions are noted; sums, products and remainders with ints stay watched.

    Args:
        plain: its value.
        expression: how it follows from the place in the training.
        answers: where questions are noted.
    """

    plain: int
    expression: Expression
    answers: Answers

    def __new__(cls, plain: int, expression: Expression, answers: Answers) -> WatchedInt:
        """Return the number, with where it comes from."""
        self = super().__new__(cls, plain)
        self.plain, self.expression, self.answers = plain, expression, answers
        return self

    def ask(self, function: Callable[[int], Any]) -> Any:
        """Return ``function(plain)`` and note it."""
        answer, expression = function(self.plain), self.expression
        self.answers.note(lambda progress: function(expression(progress)), answer)
        return answer

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (self.ask(int),)


def _read(value: Any) -> tuple[Any, Expression]:
    """Return the plain value of an operand, and how it follows from the place in the training."""
    if isinstance(value, WatchedInt):
        return value.plain, value.expression
    return value, lambda progress: value


def _derived(function: Callable[[Any, Any], Any], reflected: bool) -> Callable[[Any, Any], Any]:
    """Return the method of an operator whose result is watched, too, if both operands are ints."""

    def method(self: WatchedInt, other: Any) -> Any:
        if not isinstance(other, int):
            exact = self.ask(int)
            return function(other, exact) if reflected else function(exact, other)
        left, right = (_read(other), _read(self)) if reflected else (_read(self), _read(other))
        value = function(left[0], right[0])
        return WatchedInt(value, lambda progress: function(left[1](progress), right[1](progress)), self.answers)

    return method


def _exact(function: Callable[[Any, Any], Any], reflected: bool) -> Callable[[Any, Any], Any]:
    """Return the method of an operator that needs the value itself."""

    def method(self: WatchedInt, other: Any) -> Any:
        exact = self.ask(int)
        return function(other, exact) if reflected else function(exact, other)

    return method


def _compared(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: WatchedInt, other: Any) -> Any:
        plain, expression = _read(other)
        if not isinstance(plain, int | float):
            return function(self.ask(int), other)
        answer, own = function(self.plain, plain), self.expression
        self.answers.note(lambda progress: function(own(progress), expression(progress)), answer)
        return answer

    return method


for _name in ("add", "sub", "mul", "mod", "floordiv"):
    setattr(WatchedInt, f"__{_name}__", _derived(getattr(operator, _name), reflected=False))
    setattr(WatchedInt, f"__r{_name}__", _derived(getattr(operator, _name), reflected=True))
_OTHERS = {
    name: getattr(operator, f"__{name}__") for name in ("truediv", "pow", "and", "or", "xor", "lshift", "rshift")
}
for _name, _function in (*_OTHERS.items(), ("divmod", divmod)):
    setattr(WatchedInt, f"__{_name}__", _exact(_function, reflected=False))
    setattr(WatchedInt, f"__r{_name}__", _exact(_function, reflected=True))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(WatchedInt, f"__{_name}__", _compared(getattr(operator, _name)))
for _name, _function in {"bool": bool, "hash": hash, "float": float, "str": str, "repr": repr}.items():
    setattr(WatchedInt, f"__{_name}__", lambda self, function=_function: self.ask(function))
for _name in ("int", "index", "neg", "abs", "trunc", "round"):
    _whole = getattr(operator, _name, int)
    setattr(WatchedInt, f"__{_name}__", lambda self, *_, function=_whole: self.ask(function))
setattr(WatchedInt, "__format__", lambda self, form: format(self.ask(int), form))  # noqa: B010  # as those above


class WatchedProgress(Progress):
    """A `Progress` whose numbers are watched while a step reads them; see `watch_progress`."""

    def __getattribute__(self, name: str) -> Any:
        """Return the attribute, watched if it is a number."""
        value = super().__getattribute__(name)
        if type(value) is bool:
            vars(self)["answers"].note(operator.attrgetter(name), value)
        elif type(value) is int:
            return WatchedInt(value, operator.attrgetter(name), vars(self)["answers"])
        return value
