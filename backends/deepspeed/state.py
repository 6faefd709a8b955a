"""The state of one engine as whole tensors by parameter name, out of DeepSpeed's shards and into them."""

from __future__ import annotations

import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from xtrain.checkpoint.named import Saved, check_groups, keeps_gradients, load_settings
from xtrain.checkpoint.parts import Part
from xtrain.collectives import Collectives
from xtrain.contract import OptimizerHandle
from xtrain.errors import CheckpointError, explain

from ..eager.process_group import finish
from .engine import OptimizerEngine
from .layout import Piece


class EngineState:
    """Reads and writes what one engine keeps about its parameters.

    Args:
        engine: set up.
        handle: its optimizer.
        label: the optimizer's name.
        collectives: of the run.
    """

    def __init__(self, engine: OptimizerEngine, handle: OptimizerHandle, label: str, collectives: Collectives) -> None:
        self._engine, self._handle, self._label, self._collectives = engine, handle, label, collectives
        self._raw, self._zero = handle.optimizer, engine.zero
        trained = [name for group in engine.layout for name in group.trained]
        self._parameters = dict(zip(trained, engine.parameters, strict=True))
        self._shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self._parameters.items()}
        self._rank, self._world = collectives.rank, collectives.world_size

    # ---------------------------------------------------------------- out

    def read(self, whole: bool) -> Saved:
        """Return the state, see `xtrain.checkpoint.named`; all ranks call it.

        Args:
            whole: see `xtrain.contract.Backend.training_state`.

        Raises:
            CheckpointError: for gradients of the last step that the next one may still use.
        """
        if self._engine.leftover is not None and keeps_gradients(self._handle):
            fix = "opt.zero_grad() before the backward of every step"
            received = f"{self._label!r} with gradients left over from its last step, in DeepSpeed's buffers"
            raise CheckpointError(explain("gradients that are zeroed between two steps", received, fix))
        if self._engine.stage == 0:
            state, master = self._unsharded()
        else:
            state, master = self._gathered(whole)
        low = {n: p.dtype for n, p in self._parameters.items()}
        return {
            "class": type(self._raw).__name__,
            "groups": [self._settings(i) | {"params": list(g.names)} for i, g in enumerate(self._engine.layout)],
            "state": state,
            "dtypes": {name: torch.float32 if master else dtype for name, dtype in low.items()},
            "master": master,
            "outside": {},
        }

    def _settings(self, number: int) -> dict[str, Any]:
        group = self._present_group(number)
        return {key: value for key, value in group.items() if key != "params"}

    def _present_group(self, number: int) -> dict[str, Any]:
        """Return the settings of a group the user made; DeepSpeed has dropped those that train nothing."""
        layout = self._engine.layout
        if self._engine.stage == 0 or not layout[number].trained:
            return layout[number].group
        kept = [i for i, group in enumerate(layout) if group.trained]
        present: dict[str, Any] = self._raw.param_groups[kept.index(number)]
        return present

    def _unsharded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        masters = dict(self._engine.copies())
        keys = {name: masters.get(p, p) for name, p in self._parameters.items()}
        if self._rank:
            return {}, {}
        state = {
            n: {k: _cpu(v) for k, v in self._raw.state[p].items()} for n, p in keys.items() if p in self._raw.state
        }
        return state, {name: _cpu(keys[name]) for name, p in self._parameters.items() if p in masters}

    def _gathered(self, whole: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the state of the shards: whole tensors on rank 0, or each rank's parts."""
        tables = self._tables(self._pieces(), "read")
        members = _members(tables)
        state: dict[str, Any] = {}
        master: dict[str, Tensor] = {}
        for number, shard in enumerate(self._engine.masters()):
            names = members.get(number, [])
            parts = partial(self._parts, names=names, pieces=tables[self._rank])
            take = partial(self._whole, tables=tables) if whole else parts
            entries = self._raw.state.get(shard, {})
            for key in sorted(entries):  # every rank in the same order
                value = entries[key]
                if not (isinstance(value, Tensor) and value.shape == shard.shape):
                    for name in names:
                        state.setdefault(name, {})[key] = _cpu(value)
                    continue
                for name, found in take(value, number).items():
                    state.setdefault(name, {})[key] = found
            if any(p.dtype != shard.dtype for p in self._parameters.values()):
                master |= take(shard, number)
        return ({}, {}) if self._rank and whole else (state, master)

    def _parts(self, shard: Tensor, number: int, names: Sequence[str], pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return what lies in this rank's shard, by parameter; nothing of those that lie elsewhere."""
        own = shard.detach()
        mine = {piece.name: piece for piece in pieces if piece.shard == number}
        found = {}
        for name in names:
            piece = mine.get(name, Piece(name, number, 0, 0, 0))
            numbers = own[piece.at : piece.at + piece.count]
            found[name] = Part(numbers, piece.start, tuple(self._shapes[name]))
        return found

    def _whole(self, shard: Tensor, number: int, tables: Sequence[Sequence[Piece]]) -> dict[str, Tensor]:
        """Return the parameters' parts of a shard of all ranks, put together; empty on every rank but 0."""
        own = shard.detach().to("cpu").contiguous()
        parts = [torch.empty_like(own) for _ in range(self._world)] if self._rank == 0 else None
        finish(dist.gather(own, parts, 0, async_op=True), own.device, f"gather the state of {self._label!r}")
        found: dict[str, Tensor] = {}
        for part, table in zip(parts or [], tables, strict=bool(parts)):
            for piece in table:
                if piece.shard == number:
                    if piece.name not in found:
                        found[piece.name] = torch.empty(self._shapes[piece.name].numel(), dtype=own.dtype)
                    flat = found[piece.name]
                    flat[piece.start : piece.start + piece.count] = part[piece.at : piece.at + piece.count]
        return {name: flat.view(self._shapes[name]) for name, flat in found.items()}

    def _tables(self, pieces: Sequence[Piece], verb: str) -> list[list[Piece]]:
        """Return the pieces of each rank, which meet here to read or load what lies in them."""
        rows = self._collectives.gather_json(list(map(astuple, pieces)), f"{verb} the state of {self._label!r}")
        return [[Piece(*row) for row in theirs] for theirs in rows]

    def _pieces(self) -> list[Piece]:
        return list(self._pieces_of_stage_3() if self._engine.stage == 3 else self._pieces_of_stage_1_and_2())

    def _pieces_of_stage_1_and_2(self) -> Iterator[Piece]:
        parameters: Mapping[str, Any] = self._parameters
        for name, parameter in parameters.items():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:  # None: no part of it lies here
                high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield Piece(name, mapping.param_group_index, high.start, low.start, high.numel)

    def _pieces_of_stage_3(self) -> Iterator[Piece]:
        parameters: Mapping[str, Any] = self._parameters
        for name, parameter in parameters.items():
            shard, at, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            start = size * self._rank
            count = min(size, parameter.ds_numel - start)
            if count > 0:  # the last ranks' part is shorter, or nothing
                yield Piece(name, shard, at, start, count)

    # ---------------------------------------------------------------- in

    def load(self, saved: Saved, weights: MutableMapping[str, Tensor]) -> None:
        """Restore the engine; every rank takes its own part of the whole tensors.

        Args:
            saved: from `read`, or from another backend.
            weights: the module's parameters as they were saved, by name.

        Raises:
            CheckpointError: for other groups than those saved.
        """
        layout = self._engine.layout
        check_groups(self._label, type(self._raw).__name__, [g.names for g in layout], saved)
        for number, old in enumerate(saved["groups"]):
            load_settings(self._present_group(number), old)
        sources: Mapping[str, Tensor] = ChainMap(saved["master"], weights)
        with torch.no_grad():
            if self._engine.stage == 0:
                self._load_unsharded(saved, sources)
            else:
                self._load_shards(saved, sources)

    def _load_unsharded(self, saved: Saved, sources: Mapping[str, Tensor]) -> None:
        masters = dict(self._engine.copies())
        self._raw.state.clear()
        for name, parameter in self._parameters.items():
            key = masters.get(parameter, parameter)
            if parameter in masters and name in sources:
                key.copy_(sources[name])
            if name in saved["state"]:
                entries = saved["state"][name]
                self._raw.state[key] = {k: _placed(v, k, key, saved["dtypes"].get(name)) for k, v in entries.items()}

    def _load_shards(self, saved: Saved, sources: Mapping[str, Tensor]) -> None:
        pieces = self._pieces()
        members = _members(self._tables(pieces, "load"))
        for number, shard in enumerate(self._engine.masters()):
            mine = [piece for piece in pieces if piece.shard == number]
            if any(p.dtype != shard.dtype for p in self._parameters.values()):
                for piece in mine:
                    if piece.name in sources:
                        _fill(shard, piece, sources[piece.name])
            entries = {name: saved["state"].get(name, {}) for name in members.get(number, [])}
            self._raw.state[shard] = self._shard_state(shard, mine, entries)
            if not self._raw.state[shard]:
                del self._raw.state[shard]

    def _shard_state(self, shard: Tensor, mine: Sequence[Piece], entries: Mapping[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for key in sorted({key for entry in entries.values() for key in entry}):
            values = {name: entry[key] for name, entry in entries.items() if key in entry}
            elementwise = all(isinstance(v, Tensor) and v.shape == self._shapes[n] for n, v in values.items())
            if key == "step" or not elementwise:
                state[key] = self._one_for_all(key, list(values.values()))
                continue
            flat = torch.zeros_like(shard)
            for piece in mine:
                if piece.name in values:
                    _fill(flat, piece, values[piece.name])
            state[key] = flat
        return state

    def _one_for_all(self, key: str, values: list[Any]) -> Any:
        """Return one value for a whole shard, which has one step counter."""
        numbers = {float(v) for v in values}
        if len(numbers) > 1:
            text = (
                f"Parameters of optimizer {self._label!r} were saved with {key} {sorted(numbers)}; DeepSpeed keeps one "
            )
            warnings.warn(f"{text}for all of them, and takes {max(numbers)}.", stacklevel=2)
        largest = max(values, key=float)
        return largest.clone() if isinstance(largest, Tensor) else largest


def _fill(flat: Tensor, piece: Piece, whole: Tensor) -> None:
    part = whole.reshape(-1)[piece.start : piece.start + piece.count]
    flat[piece.at : piece.at + piece.count].copy_(part)


def _members(tables: Sequence[Sequence[Piece]]) -> dict[int, list[str]]:
    """Return the parameters of each shard, over all ranks, in one order."""
    found: dict[int, set[str]] = {}
    for table in tables:
        for piece in table:
            found.setdefault(piece.shard, set()).add(piece.name)
    return {number: sorted(names) for number, names in found.items()}


def _placed(value: Any, key: str, parameter: Tensor, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if key == "step":
        return value.clone()
    return value.to(parameter.device, parameter.dtype if value.dtype is dtype else None, copy=True)


def _cpu(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
