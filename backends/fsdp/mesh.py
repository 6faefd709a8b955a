"""The mesh of processes: along ``fsdp`` parameters are sharded, along ``data`` they are repeated."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from xtrain.errors import ConfigurationError, explain

AXES = ("data", "fsdp")


def read_mesh(mesh: Mapping[str, int] | None, replicate: int | None) -> dict[str, int] | None:
    """Return the axes that the options ask for; None shards over all processes.

    Args:
        mesh: sizes by axis, out of `AXES`.
        replicate: the size of ``data`` alone; the rest is ``fsdp``, whose size is then 0 here.

    Raises:
        ConfigurationError: for an unknown axis, a size below 1, or two options that disagree.
    """
    if mesh is None:
        if replicate is None:
            return None
        _check_sizes({"replicate": replicate})
        return {"data": replicate, "fsdp": 0}
    unknown = sorted(set(mesh) - set(AXES))
    if unknown or not mesh:
        expected = "a mesh with the axes 'data' and 'fsdp'"
        raise ConfigurationError(explain(expected, dict(mesh), "FSDP(mesh={'data': 2, 'fsdp': 4})"))
    _check_sizes(mesh)
    if replicate not in (None, mesh.get("data", 1)):
        received = f"mesh={dict(mesh)} and replicate={replicate}"
        raise ConfigurationError(explain("mesh and replicate to agree", received, "mesh alone"))
    return {axis: mesh.get(axis, 1) for axis in AXES}


def _check_sizes(sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigurationError(explain(f"{name} of at least 1", repr(size), "FSDP(replicate=2)"))


def make_mesh(axes: Mapping[str, int] | None, device_type: str, world_size: int) -> DeviceMesh:
    """Return the mesh over all processes of the run.

    Raises:
        ConfigurationError: if the axes do not multiply to the number of processes.
    """
    if axes is None:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("fsdp",))
    sizes = dict(axes)
    if sizes["fsdp"] == 0 and world_size % sizes["data"] == 0:
        sizes["fsdp"] = world_size // sizes["data"]
    if math.prod(sizes.values()) != world_size:
        asked = f"replicate={axes['data']}" if axes["fsdp"] == 0 else f"mesh={dict(axes)}"
        expected = f"a mesh that the {world_size} processes of the run fill"
        raise ConfigurationError(explain(expected, asked, f"FSDP(mesh={{'data': 1, 'fsdp': {world_size}}})"))
    if sizes["data"] == 1:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("fsdp",))
    return init_device_mesh(device_type, (sizes["data"], sizes["fsdp"]), mesh_dim_names=AXES)
