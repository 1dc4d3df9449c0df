"""What is known of machines: vendors' peaks, and the shares of them that were reached.

Shares come from experiments/LOG.md (one H100, 2026-11-23) where it has them; the others are
assumptions and say so.
"""

import dataclasses
import math

from longcat_jax.config import MESH_AXES, ConfigError, MeshConfig

DENSE = 0.69
"""Dense bf16 products: cuBLAS at 656 to 732 of 989 TFLOP/s (LOG: "dense jnp.dot")."""
GROUPED = 0.66
"""The experts' products, forward and backward: 650 to 663 of 989 TFLOP/s (LOG: "Whole expert")."""
ATTENTION = 0.53
"""Attention forward and backward, useful FLOPs: 529 and 531 of 989 TFLOP/s (LOG: "attention")."""
MEMORY = 0.87
"""A copy's share of the memory's peak: 2.93 of 3.35 TB/s (LOG: "Dispatch and combine")."""
INSIDE = 0.67
"""Collectives inside of a node: an assumption, 300 of 450 GB/s."""
OUTSIDE = 0.8
"""Collectives between nodes: an assumption, 40 of 50 GB/s."""
USABLE = 0.75
"""Share of the memory that a plan may fill, since temporaries are estimates and the runtime takes
its part: 60 of 80 GB, the peak that arXiv 2509.01322 reports.
"""
FILLED = 0.95
"""Share that a job may fill which is given all of it (README: MEM_FRACTION): 76 of 80 GB."""


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One kind of GPU, eight to a node; rates per GPU, bytes or FLOPs per second."""

    name: str
    memory: float
    """Bytes."""
    memory_rate: float
    inside: float
    """What it receives from its node (NVLink, one direction)."""
    flops: float = 989e12
    """Dense bf16."""
    outside: float = 50e9
    """What it receives from other nodes (one 400 Gbit/s port)."""
    node: int = 8
    dollars_per_hour: float = 2.0
    """arXiv 2509.01322, table 7."""


HARDWARE = {
    "h100": Hardware("h100", memory=80e9, memory_rate=3.35e12, inside=450e9),
    "h800": Hardware("h800", memory=80e9, memory_rate=3.35e12, inside=200e9),
    "h200": Hardware("h200", memory=141e9, memory_rate=4.8e12, inside=450e9),
    "a100": Hardware("a100", memory=80e9, memory_rate=2.04e12, inside=300e9, flops=312e12),
}
"""By the name of `longcat plan --hardware`."""


def of_device(kind: str) -> Hardware | None:
    """The entry of a device, by JAX's name of it."""
    return next((o for o in HARDWARE.values() if kind.startswith(f"NVIDIA {o.name.upper()}")), None)


def find(name: str) -> Hardware:
    """The entry of the table.

    Raises:
      ConfigError: not in it.
    """
    if name not in HARDWARE:
        raise ConfigError(f"--hardware={name}: must be one of {', '.join(HARDWARE)}")
    return HARDWARE[name]


def group(mesh: MeshConfig, axes: tuple[str, ...], node: int) -> tuple[int, int]:
    """Devices of a group along these axes, and how many of them one node holds."""
    stride, offsets = 1, [0]
    for axis in reversed(MESH_AXES):
        size = getattr(mesh, axis)
        if axis in axes:
            offsets = [offset + stride * step for step in range(size) for offset in offsets]
        stride *= size
    return len(offsets), sum(offset < node for offset in offsets)


@dataclasses.dataclass(frozen=True)
class Load:
    """What one collective puts on a device's links."""

    inside: float
    """Bytes received from the own node."""
    outside: float
    """Bytes received from other nodes."""

    def seconds(self, hardware: Hardware) -> float:
        """Both links at once."""
        inside = self.inside / (hardware.inside * INSIDE)
        return max(inside, self.outside / (hardware.outside * OUTSIDE))


def load(kind: str, payload: float, mesh: MeshConfig, axes: tuple[str, ...], node: int) -> Load:
    """Bytes that a device receives of a collective with this payload (parallel/hlo.py).

    Gathers and reductions enter a node once, shared by its devices' ports; an exchange's parts go
    each to one device.
    """
    size, near = group(mesh, axes, node)
    if kind == "all-to-all":
        return Load(payload * (near - 1) / size, payload * (size - near) / size)
    rounds = 2 if kind == "all-reduce" else 1
    nodes = math.ceil(size / near)
    far = payload * (nodes - 1) / nodes / near
    return Load(rounds * (payload * (size - 1) / size - far), rounds * far)
