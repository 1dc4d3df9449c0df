"""What a training step must move and multiply, read off the program that XLA makes for an H100:
needs no GPU, but the extra [aot].

    python -m experiments.bench.step_roofline --config=configs/mini_2b.py [--operations=25]
        [--config.train.unroll=1 ...]

Every operation is taken to last as long as its bytes or its products take at the rates below,
whichever is longer; what a profile shows beyond that is a kernel to mend. Grouped GEMMs count the
rows that natural routing leaves empty. Not a measurement.
"""

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from experiments.bench import step_profile, timing
from longcat_jax.cli.config_file import load_config
from longcat_jax.parallel import hlo
from longcat_jax.plan.deviceless import compiled_step

BYTES_PER_SECOND = 2.8e12
FLOPS_PER_SECOND = 650e12
SHORTEST = 2e-6  # seconds of a launch
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")
OUTER = ("while", "call", "conditional")  # what they run is counted by itself
SLICES = ("dynamic-slice", "slice", "gather")
KERNEL = re.compile(
    r"/(grouped_gemm|grouped_swiglu\w*|gather_rows|flash_mla_\w+|scatter_add|mla_decode\w*|"
    r"rms_norm_gradient|skinny_\w+|add_norm|absorb_query|expand_values)/"
)


class Operation(NamedTuple):
    """One instruction of the program."""

    name: str
    scope: str
    times: int
    bytes: int
    """Read and written in one execution."""
    flops: float
    """Of matrix products."""

    @property
    def seconds(self) -> float:
        """Of all executions."""
        shortest = max(self.bytes / BYTES_PER_SECOND, self.flops / FLOPS_PER_SECOND, SHORTEST)
        return self.times * shortest


def _size(shapes: tuple[hlo.Shape, ...] | list[hlo.Shape]) -> int:
    return sum(shape.bytes for shape in shapes)


def _uses(lines: tuple[hlo.Instruction, ...], name: str) -> Iterator[tuple[str, str]]:
    """(opcode, operand's name) of what reads a value, seen through bitcasts and conversions."""
    for line in lines:
        if name in line.operands:
            if line.opcode in ("bitcast", "convert"):
                yield from _uses(lines, line.name)
            else:
                yield line.opcode, line.name if line.opcode in SLICES else line.operands[0]


def _fusion_bytes(lines: tuple[hlo.Instruction, ...]) -> int:
    """Bytes of a fusion: of arrays that it slices the slices, of those it updates the updates."""
    named, total = {line.name: line for line in lines}, 0
    for line in lines:
        if line.opcode != "parameter":
            continue
        uses = list(_uses(lines, line.name))
        if uses and all(opcode in SLICES for opcode, _ in uses):
            (whole,) = line.shapes
            read = sum(math.prod(named[name].shapes[0].dims) for _, name in uses)
            total += min(whole.bytes, whole.bytes * read // max(1, math.prod(whole.dims)))
        elif not (uses and all(opcode == "dynamic-update-slice" for opcode, _ in uses)):
            total += _size(line.shapes)
    root = lines[-1]
    results = [named[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for line in results:
        while line.opcode == "bitcast":
            line = named[line.operands[0]]
        updates = line.opcode == "dynamic-update-slice"
        total += _size(named[line.operands[1]].shapes if updates else line.shapes)
    return total


def _name(line: hlo.Instruction) -> str:
    """What a profile would call its kernel, so that step_profile's rules know it."""
    if line.opcode != "custom-call":
        return line.name
    kernel = KERNEL.search(line.op_name)
    return kernel[1] if kernel else "cublas" if "__cublas" in line.attributes else line.name


def _of_kernel(line: hlo.Instruction, inside: tuple[hlo.Instruction, ...]) -> hlo.Instruction:
    """The kernel or product of a fusion that only says where its operands lie; else `line`."""
    if not line.name.startswith("dynamic_slice_fusion"):
        return line
    return next((one for one in inside if one.opcode == "custom-call"), line)


def operations(program: hlo.Program) -> Iterator[Operation]:
    """All that takes time in one run of the program."""
    reader = hlo.Reader(program)
    for computation, times in reader.runs(program.entry).items():
        for line in program.computations[computation]:
            if line.opcode in (*FREE, *OUTER) or line.opcode.endswith("-done"):
                continue
            inner, source = next(iter(reader.called(line)), None), line
            if inner and line.opcode.startswith(("fusion", "async")):
                inside = program.computations[inner[0]]
                moved, source = _fusion_bytes(inside), _of_kernel(line, inside)
            else:
                moved = _size(reader.operands(computation, line)) + _size(line.shapes)
            flops = reader.products(computation, line)
            yield Operation(_name(source), source.op_name, times, moved, flops)


def report(found: list[Operation], count: int) -> None:
    """Prints parts of the model, then the operations that take longest."""
    parts: dict[str, list[Operation]] = defaultdict(list)
    grouped: dict[tuple[str, str], list[Operation]] = defaultdict(list)
    for one in found:
        kernel = step_profile.Kernel(0, 0, one.name, one.name, one.scope)
        parts[step_profile.part_of(kernel)].append(one)
        kind = re.sub(r"[.\d]+$", "", one.name)
        grouped[kind, one.scope].append(one)

    def seconds(group: list[Operation]) -> float:
        return sum(one.seconds for one in group)

    whole = seconds(found)
    rows = {}
    for part, group in [*sorted(parts.items(), key=lambda p: -seconds(p[1])), ("all", found)]:
        moved = sum(one.times * one.bytes for one in group) / 1e9
        flops = sum(one.times * one.flops for one in group) / 1e12
        spent = seconds(group)
        cells = f"{1e3 * spent:.1f}", f"{spent / whole:.1%}", f"{moved:.1f}", f"{flops:.1f}"
        rows[part] = [*cells, str(sum(one.times for one in group))]
    timing.table("part of a step", ["ms at least", "share", "GB", "TFLOP", "operations"], rows)
    for (kind, scope), group in sorted(grouped.items(), key=lambda g: -seconds(g[1]))[:count]:
        runs = sum(one.times for one in group)
        moved = sum(one.times * one.bytes for one in group) / runs / 1e6
        print(f"{1e3 * seconds(group):8.3f} ms {runs:4d} x {moved:8.1f} MB  {kind} | {scope[-90:]}")


def main() -> None:
    """Parses the command line, compiles and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--operations", type=int, default=25, help="operations listed")
    args, rest = parser.parse_known_args()
    if strange := [text for text in rest if not text.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    overrides = [text.removeprefix("--config.") for text in rest]
    compiled = compiled_step(load_config(args.config, overrides))
    stats = compiled.memory_analysis()
    arguments, rest = (
        size / 1e9 for size in (stats.argument_size_in_bytes, stats.temp_size_in_bytes)
    )
    print(f"arguments {arguments:.1f} GB, temporaries {rest:.1f} GB")
    report(list(operations(hlo.parse(compiled.as_text()))), args.operations)


if __name__ == "__main__":
    main()
