"""Batches of every kind of container: their tensors are reached, their type and what else they hold is kept."""

from __future__ import annotations

from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from dataclasses import InitVar, dataclass, field
from types import MappingProxyType
from typing import Any

import pytest
import torch
from small import says
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from xtrain import ConfigurationError
from xtrain.contract import Backend
from xtrain.hooks import BatchHooks
from xtrain.precision import resolve_precision
from xtrain.tensors import map_tensors, move_module, tensors_in

Pair = namedtuple("Pair", "x y")


class Named(Pair):
    """A namedtuple with another __new__ and an attribute of its own."""

    def __new__(cls, x):
        made = super().__new__(cls, x, x)
        made.note = "kept"
        return made


class Rows(list):
    def __init__(self, first, *, width):
        super().__init__([first])
        self.width = width


class Keyed(dict):
    def __init__(self, first, *, width):
        super().__init__(x=first)
        self.width = width


class Several(tuple):
    def __new__(cls, *items):
        return super().__new__(cls, items)


@dataclass
class Scaled:
    x: Tensor
    scale: InitVar[float] = 1.0
    mask: Any = field(init=False, default=None)
    late: Any = field(init=False)

    def __post_init__(self, scale):
        self.factor, self.made = scale, self.x + 1


@dataclass(frozen=True)
class Frozen:
    x: Tensor


@dataclass
class Slotted:
    __slots__ = ("x",)
    x: Tensor


def scaled(x):
    batch = Scaled(x, 2.0)
    batch.mask = x > 0
    return batch


def user_dict(x):
    batch = UserDict(x=x)
    batch.note = "kept"
    return batch


CONTAINERS = {
    "dict": (lambda x: {"x": x, "n": 3}, 1),
    "defaultdict": (lambda x: defaultdict(list, x=x), 1),
    "OrderedDict": (lambda x: OrderedDict(a=x, b=x), 2),
    "UserDict": (user_dict, 1),
    "MappingProxyType": (lambda x: MappingProxyType({"x": x}), 1),
    "ChainMap": (lambda x: ChainMap({"x": x}, {"y": x}), 2),
    "dict with another __init__": (lambda x: Keyed(x, width=3), 1),
    "list": (lambda x: [x, [x, "text"]], 2),
    "deque": (lambda x: deque([x, x], maxlen=2), 2),
    "UserList": (lambda x: UserList([x]), 1),
    "list with another __init__": (lambda x: Rows(x, width=3), 1),
    "tuple": (lambda x: (x, 3, x.shape), 1),
    "tuple with another __new__": (lambda x: Several(x, x), 2),
    "namedtuple": (lambda x: Pair(x, x), 2),
    "namedtuple with another __new__": (Named, 2),
    "structseq": (lambda x: torch.max(x, dim=0), 2),
    "dataclass": (scaled, 3),
    "frozen dataclass": (Frozen, 1),
    "slotted dataclass": (Slotted, 1),
}


@pytest.mark.parametrize(("make", "count"), CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_keeps_its_type_and_what_else_it_holds(make, count):
    given = make(torch.ones(2, 3))
    before = list(tensors_in(given))
    new = map_tensors(lambda tensor: tensor.double() + 1, given)
    after = list(tensors_in(new))
    assert type(new) is type(given)
    assert len(before) == len(after) == count
    for old, tensor in zip(before, after, strict=True):
        assert torch.equal(tensor, old.double() + 1)
    assert [t.dtype for t in tensors_in(given)] == [t.dtype for t in before]  # the user's batch is left alone
    others = {name: value for name, value in getattr(given, "__dict__", {}).items() if not list(tensors_in(value))}
    assert others.items() <= getattr(new, "__dict__", {}).items()


def test_a_defaultdict_goes_on_making_defaults():
    assert map_tensors(lambda t: t, defaultdict(list, x=torch.ones(1)))["new"] == []


def test_init_vars_and_late_fields_are_kept():
    new = map_tensors(lambda t: t * 2, scaled(torch.ones(2)))
    assert (new.factor, new.made.tolist(), new.mask.tolist()) == (2.0, [4.0, 4.0], [2, 2])
    assert not hasattr(new, "late")


def test_a_packed_sequence_keeps_the_sizes_of_its_batches_on_the_cpu():
    packed = pack_sequence([torch.ones(1, 2), torch.zeros(3, 2)], enforce_sorted=False)
    new = map_tensors(lambda t: t.to("meta"), packed)
    assert type(new) is type(packed)
    assert (new.data.device.type, new.sorted_indices.device.type) == ("meta", "meta")
    assert new.batch_sizes is packed.batch_sizes


class Broken(dict):
    def __copy__(self):
        raise NotImplementedError("no copies of this")


def test_a_container_that_cannot_be_copied_names_the_hook():
    with pytest.raises(ConfigurationError) as caught:
        map_tensors(lambda t: t + 1, Broken(x=torch.ones(1)))
    says(caught.value, "Broken", "no copies of this", "transfer_batch_to_device")


# ---------------------------------------------------------------- objects that move themselves


class Graph:
    """As a library of graphs makes it: no container, but it moves."""

    def __init__(self, x, in_place=False):
        self.x, self.in_place = x, in_place

    def to(self, device):
        if self.in_place:
            self.x = self.x.to(device)
            return None
        return Graph(self.x.to(device))


class Tokens(UserDict):
    """As tokenizers return: a mapping that moves."""

    def to(self, device):
        self.data = {name: value.to(device) for name, value in self.data.items()}
        return self


class Quantity:
    def to(self, unit):
        return {"m": 1}[unit]


class Meta(Backend):
    """Enough of a backend to move a batch."""

    device = torch.device("meta")


Meta.__abstractmethods__ = frozenset()


@pytest.fixture(params=["backend", "hook"])
def move(request):
    if request.param == "backend":
        return Meta().batch_to_device
    return lambda batch: BatchHooks().transfer_batch_to_device(batch, torch.device("meta"), 0)


@pytest.mark.parametrize("in_place", [False, True])
def test_objects_with_a_method_to_are_moved(move, in_place):
    batch = move({"graph": Graph(torch.ones(2), in_place), "y": [torch.ones(2)]})
    assert (batch["graph"].x.device.type, batch["y"][0].device.type) == ("meta", "meta")


def test_mappings_with_a_method_to_are_moved_by_it(move):
    assert move(Tokens(x=torch.ones(2)))["x"].device.type == "meta"


def test_an_object_whose_to_takes_no_device_names_the_hook(move):
    with pytest.raises(ConfigurationError) as caught:
        move([Quantity()])
    says(caught.value, "Quantity.to(device)", "transfer_batch_to_device")


def test_under_a_true_precision_a_moved_container_is_cast_too():
    backend = Meta()
    backend.precision = resolve_precision("bf16-true")
    moved = backend.batch_to_device(Tokens(x=torch.ones(2), ids=torch.ones(2, dtype=torch.long)))
    assert (moved["x"].dtype, moved["ids"].dtype) == (torch.bfloat16, torch.long)


# ---------------------------------------------------------------- complex numbers


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.register_buffer("phases", torch.polar(torch.ones(2), torch.tensor([0.5, 1.0])))


def test_complex_tensors_of_a_module_keep_their_imaginary_part():
    module, phases = Rotary(), Rotary().phases
    move_module(module, torch.device("cpu"), torch.bfloat16)
    assert module.net.weight.dtype == torch.bfloat16
    assert module.weight.dtype == torch.complex64
    assert torch.equal(module.phases, phases)


def test_complex_batches_keep_their_imaginary_part():
    backend = Meta()
    backend.precision, backend.device = resolve_precision("bf16-true"), torch.device("cpu")
    assert backend.batch_to_device(torch.tensor([1 + 2j])).tolist() == [1 + 2j]
