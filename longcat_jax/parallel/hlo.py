"""What a compiled program sends over which mesh axes, and what it computes meanwhile.

Reads the text of a compiled module (`compiled.as_text()`): its collectives with their bytes, the
mesh axes that their replica groups lie along, how often they run (trip counts of the loops around
them), and, where the module is scheduled and a collective is a pair of start and done, the matrix
products between the two. The GPU compiler makes such pairs without a GPU too, so that a test can
prove that communication is hidden.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAMES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|body|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_CONTRACTED = re.compile(r'(lhs|rhs)_contracting_dim(?:ension)?s"?[=:]\s*[{\[]([\d",\s]*)[}\]]')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=(?:\{\{.*?\}\}|\S+(?: \{[^}]*\})?)")
_MESH_GROUPS = re.compile(r"mesh\[([^\]]*)\] \{([^}]*)\}")
_IOTA_GROUPS = re.compile(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")

Axes = tuple[str, ...] | None
"""Mesh axes that a collective's groups lie along; None: along no product of axes."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of all its elements; 0 for a token."""
        digits = re.match(r"(?:bf|[fsu])(\d+)", self.dtype)
        bits = BITS.get(self.dtype, int(digits[1]) if digits else 0)
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Arrays of the result, tuples flattened."""
    operands: tuple[str, ...]
    attributes: str
    """All that follows the operands."""

    @property
    def op_name(self) -> str:
        """The path of names that JAX gave it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """A module: instructions of every computation in their order."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    scheduled: bool
    """Whether that order is the order of execution."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction, or a pair of start and done."""

    kind: str
    axes: Axes
    group_size: int
    arrays: int
    """Arrays that it moves: the compiler joins small collectives into one."""
    payload: int
    """Bytes of the whole array on one device: gathered, before a reduction, or exchanged."""
    times: int
    """Executions in one run of the program."""
    asynchronous: bool
    products: float
    """FLOPs of matrix products between start and done."""
    exposed: float
    """Seconds that the device waits for it in one execution, by `collectives`' rates."""
    op_name: str
    computation: str

    @property
    def received(self) -> float:
        """Bytes that a device receives in one execution, by a ring or a direct exchange."""
        share = (self.group_size - 1) / self.group_size
        return self.payload * {"all-reduce": 2 * share, "collective-permute": 1}.get(
            self.kind, share
        )


def _closing(text: str, start: int) -> int:
    """Index behind the parenthesis that closes the one at `start`."""
    depth, index = 0, start
    while True:
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        index += 1
        if not depth:
            return index


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(size) for size in dims.split(",") if size))
        for dtype, dims in _SHAPE.findall(text)
    )


def _instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if not head:
        return None
    start = head.end()
    if line[start] == "(":
        end = _closing(line, start)
    else:
        end = line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    behind = _closing(line, opcode.end() - 1)
    operands = tuple(_NAMES.findall(line[opcode.end() : behind]))
    return Instruction(head[2], opcode[1], _shapes(line[start:end]), operands, line[behind:])


def parse(text: str) -> Program:
    """The module of an HLO text.

    Raises:
      ValueError: no ENTRY computation in it.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry, name, lines = "", "", []
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            name, lines = head[2], []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = tuple(lines)
        elif instruction := _instruction(line):
            lines.append(instruction)
    if not entry:
        raise ValueError("not the text of a module: no ENTRY computation")
    return Program(computations, entry, "is_scheduled=true" in text.partition("\n")[0])


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text or ""))


def _named_groups(mesh: str, along: str) -> np.ndarray:
    """Groups along axes of the compiler's own mesh, or along parts of them.

    `'a':(2)4` is what lies between the 2 outermost parts of axis a and 4 times as many.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    inner = [
        (name, *((int(before), int(size)) if size else (1, sizes[name])))
        for name, before, size in _AXIS.findall(along)
    ]
    shape, places = [], {}
    for name, size in sizes.items():
        cuts = {1, size}
        for other, before, part in inner:
            cuts |= {before, before * part} if other == name else set()
        for start, end in itertools.pairwise(sorted(cuts)):
            places[name, start] = len(shape)
            shape.append(end // start)
    dims = [
        place
        for name, before, part in inner
        for (other, start), place in places.items()
        if other == name and before <= start < before * part
    ]
    outer = [dim for dim in range(len(shape)) if dim not in dims]
    grid = np.arange(math.prod(shape)).reshape(shape).transpose(*outer, *dims)
    return grid.reshape(-1, math.prod(shape[dim] for dim in dims))


def _groups(text: str, devices: int) -> np.ndarray:
    """[groups, devices of a group] of replica groups in any of their notations."""
    if found := _MESH_GROUPS.search(text):
        return _named_groups(found[1], found[2])
    if found := _IOTA_GROUPS.search(text):
        grid = np.arange(int(found[1]) * int(found[2])).reshape(_numbers(found[3]))
        return grid.transpose(_numbers(found[4]) or None).reshape(int(found[1]), int(found[2]))
    listed = [_numbers(group) for group in re.findall(r"\{([\d, ]+)\}", text)]
    return np.array(listed or [range(devices)])


@functools.lru_cache(maxsize=256)
def _axes(text: str, sizes: tuple[tuple[str, int], ...]) -> tuple[Axes, int]:
    """Mesh axes and size of a collective's groups."""
    mesh = {name: size for name, size in sizes if size > 1}
    names, shape = tuple(mesh), tuple(mesh.values())
    grid = np.arange(math.prod(shape)).reshape(shape)
    groups = _groups(text, grid.size)
    if text.startswith("source_target_pairs"):
        places = zip(names, np.unravel_index(groups, shape), strict=True)
        return tuple(name for name, at in places if (at[:, 0] != at[:, 1]).any()), 2
    ours = {frozenset(group) for group in groups.tolist()}
    for count in range(len(names) + 1):
        for inner in itertools.combinations(range(len(names)), count):
            outer = [dim for dim in range(len(names)) if dim not in inner]
            size = math.prod(shape[dim] for dim in inner)
            theirs = grid.transpose(*outer, *inner).reshape(-1, size).tolist()
            if ours == {frozenset(group) for group in theirs}:
                return tuple(names[dim] for dim in inner), size
    return None, groups.shape[1]


class Reader:
    """Looks up what names in a program stand for."""

    def __init__(self, program: Program) -> None:
        self.computations = program.computations
        self._named = {
            computation: {line.name: line for line in lines}
            for computation, lines in program.computations.items()
        }
        self._products: dict[str, float] = {}

    def operands(self, computation: str, line: Instruction) -> list[Shape]:
        """Arrays that an instruction reads."""
        named = self._named[computation]
        return [shape for name in line.operands for shape in named[name].shapes]

    def called(self, line: Instruction) -> Iterator[tuple[str, int]]:
        """Computations that an instruction runs, and how often; the longest branch of several."""
        trips = _TRIPS.search(line.attributes)
        for keyword, name in _CALLED.findall(line.attributes):
            if keyword != "to_apply" or line.opcode == "call":
                yield name, int(trips[1]) if trips and keyword == "body" else 1
        branches = [
            name
            for several, one in _BRANCHES.findall(line.attributes)
            for name in (_NAMES.findall(several) or [one])
        ]
        if branches:
            yield max(branches, key=self.products_of), 1

    def products_of(self, computation: str) -> float:
        """FLOPs of the matrix products of a whole computation."""
        if computation not in self._products:
            lines = self.computations[computation]
            self._products[computation] = sum(self.products(computation, line) for line in lines)
        return self._products[computation]

    def products(self, computation: str, line: Instruction) -> float:
        """FLOPs of matrix products in one instruction and in what it calls.

        Of kernels grouped products and causal attention are known; what is shown to hide
        communication is a lower bound.
        """
        if line.opcode == "custom-call":
            target = _TARGET.search(line.attributes)
            if target and target[1].startswith("mosaic_gpu"):
                operands = self.operands(computation, line)
                if "/flash_mla_" in line.op_name:
                    return _attention_product(line.op_name, operands, line.shapes)
                return _grouped_product([*operands, *line.shapes])
            if not (target and target[1].startswith("__cublas")):
                return 0.0
        elif line.opcode != "dot":
            return sum(times * self.products_of(name) for name, times in self.called(line))
        contracted = dict(_CONTRACTED.findall(line.attributes))["lhs"]
        lhs = self.operands(computation, line)[0]
        depth = math.prod(lhs.dims[dim] for dim in _numbers(contracted))
        return 2.0 * math.prod(line.shapes[0].dims) * depth

    def runs(self, entry: str) -> dict[str, int]:
        """How often every computation runs; the insides of single operations left out."""
        times, waiting = {entry: 1}, [entry]
        for computation in waiting:
            for line in self.computations[computation]:
                if not line.opcode.startswith(("fusion", "async")):
                    for inner, trips in self.called(line):
                        times[inner] = times.get(inner, 0) + trips * times[computation]
                        waiting.append(inner)
        return times


def _grouped_product(arrays: list[Shape]) -> float:
    """2 R K N of [R, K], [G, K, N] and [R, N], in any role and with all rows in use; else 0."""
    floats = [shape.dims for shape in arrays if shape.dtype[0] in "bf"]
    two, three = ([dims for dims in floats if len(dims) == rank] for rank in (2, 3))
    for weights in three:
        for (rows, one), (same, other) in itertools.permutations(two, 2):
            if rows == same and (one, other) == weights[1:]:
                return 2.0 * rows * one * other
    return 0.0


def _attention_product(name: str, operands: list[Shape], results: tuple[Shape, ...]) -> float:
    """FLOPs of a kernel of pallas_kernels/flash_mla as if every query saw half of the keys."""
    reads, results = operands[0].dims, [shape.dims for shape in results]
    if "/flash_mla_queries" in name:  # of keys [B, S, ...] dq [B, T, heads, Q]
        (batch, tokens, heads, width), keys = results[0], reads[1]
        return float(batch * heads * tokens * keys * width)
    # Of q [B, T, H, Q] and keys [B, S, ...].
    batch, tokens, _, width = reads
    keys = operands[1].dims[1]
    if "/flash_mla_forward" in name:
        heads, value_width, products = *results[0][2:], 1
    else:  # every part's dk, dv [B, S, heads, V] and tiles of dS
        heads, value_width, products = *results[-2][2:], 2
    return float(products * batch * heads * tokens * keys * (width + value_width))


def _start(reader: Reader, line: Instruction) -> tuple[str, str] | None:
    """Kind and groups of the collective that an instruction is or starts."""
    if line.opcode == "async-start":
        name = next(reader.called(line))[0]
        return next(filter(None, (_start(reader, one) for one in reader.computations[name])), None)
    kind = line.opcode.removesuffix("-start")
    groups = _GROUPS.search(line.attributes)
    return (kind, groups[0] if groups else "") if kind in KINDS else None


def collectives(
    program: Program,
    mesh: Mapping[str, int],
    *,
    flops_per_second: float = 700e12,
    bytes_per_second: float = 300e9,
) -> list[Collective]:
    """All collectives of a program, by computation and in the order of their starts.

    `exposed` comes of walking every computation with two clocks: products take their FLOPs at one
    rate, collectives, one after the other, their bytes at the other rate, all else takes no time; a
    done waits for its collective.

    Args:
      program: what every device runs (SPMD), as compiled.
      mesh: size of every axis, outermost first; devices are numbered along it.
      flops_per_second: rate of matrix products.
      bytes_per_second: rate at which a device receives.
    """
    reader, sizes, found = Reader(program), tuple(mesh.items()), []
    for computation, times in reader.runs(program.entry).items():
        products = now = free = 0.0  # FLOPs so far; seconds; when the network is free
        pending: dict[str, tuple[int, float, float]] = {}
        for line in program.computations[computation]:
            start = _start(reader, line)
            if start is None:
                work = reader.products(computation, line)
                products, now = products + work, now + work / flops_per_second
                if line.opcode.endswith("-done") and line.operands[0] in pending:
                    index, before, end = pending.pop(line.operands[0])
                    found[index] = dataclasses.replace(
                        found[index], products=products - before, exposed=max(end - now, 0.0)
                    )
                    now = max(now, end)
                continue
            one = _collective(reader, line, computation, start, sizes)
            free = max(now, free) + one.received / bytes_per_second
            if one.asynchronous:
                pending[line.name] = len(found), products, free
            else:
                one, now = dataclasses.replace(one, exposed=free - now), free
            found.append(dataclasses.replace(one, times=times))
    return found


def _collective(
    reader: Reader,
    line: Instruction,
    computation: str,
    start: tuple[str, str],
    sizes: tuple[tuple[str, int], ...],
) -> Collective:
    """What is known of a collective without its surroundings."""
    kind, groups = start
    axes, group_size = _axes(groups, sizes)
    operands = reader.operands(computation, line)
    payload = sum(shape.bytes for shape in operands)
    if kind == "all-gather":
        payload *= group_size
    return Collective(
        kind=kind,
        axes=axes,
        group_size=group_size,
        arrays=len(operands),
        payload=payload,
        times=1,
        asynchronous=line.opcode.endswith("-start"),
        products=0.0,
        exposed=0.0,
        op_name=line.op_name,
        computation=computation,
    )


def totals(found: list[Collective]) -> dict[tuple[str, Axes], tuple[int, int]]:
    """(kind, axes) -> (arrays moved, bytes of payload) in one run of the program."""
    sums: dict[tuple[str, Axes], tuple[int, int]] = {}
    for one in found:
        arrays, payload = sums.get((one.kind, one.axes), (0, 0))
        sums[one.kind, one.axes] = (
            arrays + one.times * one.arrays,
            payload + one.times * one.payload,
        )
    return sums


def overlap_table(
    found: list[Collective], *, flops_per_second: float = 700e12, bytes_per_second: float = 300e9
) -> str:
    """One line a collective: bytes, their time, products meanwhile, their time, what is exposed."""
    lines = [
        f"{'collective':<20} {'axes':<14} {'runs':>5} {'MB':>8} {'us':>8} {'GFLOP':>9} {'us':>8} "
        f"{'exposed':>8}  name"
    ]
    for one in found:
        axes = "x".join(one.axes) if one.axes is not None else "?"
        lines.append(
            f"{one.kind + ('' if one.asynchronous else ' (sync)'):<20} {axes:<14} {one.times:>5} "
            f"{one.payload / 1e6:>8.2f} {1e6 * one.received / bytes_per_second:>8.1f} "
            f"{one.products / 1e9:>9.1f} {1e6 * one.products / flops_per_second:>8.1f} "
            f"{1e6 * one.exposed:>8.1f}  {one.op_name[-48:]}"
        )
    return "\n".join(lines)
