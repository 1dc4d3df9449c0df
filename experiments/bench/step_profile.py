"""Where a step's time goes: the kernels of an XLA profile, sorted into parts of the model.

A kernel belongs to the HLO operation that launched it, whose metadata names the modules and scopes
it was traced in; RULES turns both into a part.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax


class Kernel(NamedTuple):
    """One launch on the GPU; times in nanoseconds."""

    start: float
    duration: float
    name: str
    operation: str
    """Name of the HLO instruction, "" if the profile doesn't say."""
    scope: str
    """Where it was traced, "" if the program doesn't say."""


COMMUNICATION = "communication"
RULES = (
    (COMMUNICATION, r"^nccl"),
    ("copies and memsets", r"^(MemcpyD2D|Memset|MemcpyH2D|MemcpyD2H)"),
    ("optimizer", r"/optimizer/"),
    ("attention", r"^(flash_mla|mla_decode)"),
    ("expert GEMM", r"^grouped_gemm"),
    ("router", r"/router/"),
    ("dispatch, SwiGLU, combine", r"^(gather_rows|grouped_swiglu)|/experts/"),
    ("head and loss", r"cross_entropy"),
    ("dense GEMM", r"gemm|cublas|cutlass|nvjet|dot_general"),
    ("embedding", r"^scatter_add|/embed"),
    ("norms and elementwise", r""),
)
"""(part, pattern over "kernel name | HLO operation | scope"); the first match counts."""


def scopes(program: str) -> dict[str, str]:
    """Scope of every instruction of a compiled program's text."""
    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
    return {name: scope for name, scope in pattern.findall(program)}


def kernels(folder: Path, program: str) -> list[Kernel]:
    """Launches of the first GPU in a folder that jax.profiler.trace wrote, in order of start.

    Raises:
      ValueError: the profile holds no GPU.
    """
    scope_of = scopes(program)

    def read() -> Iterator[Kernel]:
        for file in sorted(folder.rglob("*.xplane.pb")):
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                if not plane.name.startswith("/device:GPU:0"):
                    continue
                for line in plane.lines:
                    if not line.name.startswith("Stream"):
                        continue
                    for event in line.events:
                        stats = dict(event.stats)
                        operation = str(stats.get("hlo_op", ""))
                        scope = scope_of.get(operation, "")
                        start, duration = event.start_ns, event.duration_ns
                        yield Kernel(start, duration, event.name, operation, scope)

    found = sorted(read())
    if not found:
        raise ValueError(f"{folder}: the profile holds no GPU kernels")
    return found


def part_of(kernel: Kernel) -> str:
    """The part of the model that a kernel works for."""
    text = f"{kernel.name} | {kernel.operation} | {kernel.scope}"
    return next(part for part, pattern in RULES if re.search(pattern, text))


def idle(found: list[Kernel]) -> float:
    """Nanoseconds between first start and last end in which no kernel ran."""
    total, end = 0.0, found[0].start
    for kernel in found:
        total += max(0.0, kernel.start - end)
        end = max(end, kernel.start + kernel.duration)
    return total


def communication(found: list[Kernel]) -> tuple[float, float]:
    """Nanoseconds of communication, and those of them in which another kernel ran beside it."""
    total = beside = 0.0
    others = [kernel for kernel in found if part_of(kernel) != COMMUNICATION]
    for kernel in (kernel for kernel in found if part_of(kernel) == COMMUNICATION):
        end, reached = kernel.start + kernel.duration, kernel.start
        total += kernel.duration
        for other in others:  # in order of their start
            until = min(end, other.start + other.duration)
            beside += max(0.0, until - max(reached, other.start))
            reached = max(reached, until)
    return total, beside


def breakdown(found: list[Kernel]) -> dict[str, tuple[float, int]]:
    """(nanoseconds, launches) of every part, largest first."""
    sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for kernel in found:
        time, launches = sums[part_of(kernel)]
        sums[part_of(kernel)] = time + kernel.duration, launches + 1
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def longest(found: list[Kernel], count: int) -> list[tuple[str, float, int]]:
    """(description, nanoseconds, launches) of the kernels that take longest, summed by operation
    and name.
    """
    sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for kernel in found:
        key = f"{part_of(kernel)} | {kernel.name[:60]} | {kernel.operation} | {kernel.scope[-90:]}"
        time, launches = sums[key]
        sums[key] = time + kernel.duration, launches + 1
    ordered = sorted(sums.items(), key=lambda item: -item[1][0])[:count]
    return [(key, time, launches) for key, (time, launches) in ordered]
