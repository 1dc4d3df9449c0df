"""The plan as text."""

from collections.abc import Iterable, Sequence

from longcat_jax.config import MESH_AXES, MeshConfig
from longcat_jax.parallel.expert import EXCHANGES
from longcat_jax.plan import decoding as decoding_lib
from longcat_jax.plan import traffic as traffic_lib
from longcat_jax.plan import training
from longcat_jax.plan.hardware import FILLED, USABLE, Hardware
from longcat_jax.plan.job import Job
from longcat_jax.plan.memory import Memory
from longcat_jax.plan.training import Step

GB = 1e9
Row = Sequence[str]


def table(title: str, header: Row, rows: Iterable[Row]) -> str:
    """Columns under a title, the first to the left and the others to the right; a header of empty
    cells is left out.
    """
    lines = [header, *rows] if any(header) else list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def text(line: Row) -> str:
        first, *rest = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return "  ".join([f"  {first}", *rest]).rstrip()

    return "\n".join([title, *map(text, lines)])


def unit_of(values: float) -> tuple[float, str, str]:
    """What to count so many parameters in: its size, its letter, its name."""
    units = (1e9, "B", "billions"), (1e6, "M", "millions"), (1e3, "K", "thousands")
    return next((unit for unit in units if values >= unit[0]), units[-1])


def amount(values: float, digits: int = 2) -> str:
    """A number of parameters: `560.66 B`."""
    unit, letter, _ = unit_of(values)
    return f"{values / unit:.{digits}f} {letter}"


def axes_text(axes: Sequence[str]) -> str:
    """`fsdp x expert`."""
    return " x ".join(axes) or "-"


def mesh_text(mesh: MeshConfig) -> str:
    """Sizes of the axes that cut anything, as overrides write them."""
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    return (
        " ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1) or "mesh of 1"
    )


def parts(job: Job) -> str:
    """Where the parameters lie."""
    unit, _, name = unit_of(sum(part.values for part in job.parts.values()))
    rows = []
    for part in job.parts.values():
        axes = [axis for axis in part.cut if getattr(job.mesh, axis) > 1]
        here = part.here(job.mesh)
        rows.append([part.name, f"{part.values / unit:.3f}", axes_text(axes), f"{here / unit:.4f}"])
    return table(f"parameters, {name}", ["part", "in all", "cut over", "on a device"], rows)


def memory(found: Memory, hardware: Hardware) -> str:
    """Where the memory goes."""
    limit = USABLE * hardware.memory
    named = {
        "master weights, float32": found.weights,
        "optimizer state": found.optimizer,
        "blocks' weights in the compute dtype": found.copies,
        "batch": found.batch,
        "sums of gradients": found.sums,
        "gradients of a micro-batch": found.gradients,
        "activations kept for the backward pass": found.kept,
        "in a block's backward pass": found.block,
        "or before: a chunk of logits": found.loss,
        "or after: a lookup table and its gradient": found.embedding,
        "arguments of the step": found.arguments,
        "arguments and temporaries": found.total,
    }
    rows = [[name, f"{size / GB:.2f}"] for name, size in named.items()]
    verdict = "fits" if found.total <= limit else "does NOT fit"
    title = f"memory of a device; {verdict} into {limit / GB:.1f} GB of {hardware.name}"
    if limit < found.total <= FILLED * hardware.memory:
        title += f", but into the {hardware.memory / GB:.0f} that it has"
    return table(title, ["", "GB"], rows)


def traffic(job: Job, hardware: Hardware) -> str:
    """What each device receives in a step."""
    rows = []
    for flow in traffic_lib.flows(job):
        load = flow.load(job.mesh, hardware.node)
        rows.append(
            [
                flow.name + (", backward" if flow.backward else ""),
                flow.kind,
                axes_text(flow.axes),
                str(flow.times),
                f"{flow.payload / 1e6:.1f}",
                f"{flow.times * load.inside / GB:.2f}",
                f"{flow.times * load.outside / GB:.2f}",
                f"{1e3 * training.seconds(flow, job, hardware):.1f}",
                flow.behind,
            ]
        )
    header = ["traffic", "collective", "along", "times", "MB each", "NVLink GB", "network GB", "ms"]
    title = f"what a device receives in a step; experts by {job.backend}"
    title += ", dropless" if job.dropless else ", fixed capacity"
    return table(title, [*header, "hides behind"], rows)


def backends(job: Job, hardware: Hardware) -> str:
    """The expert back-ends side by side.

    What is gathered is taken to enter a node once, shared by its devices' ports and passed on over
    NVLink (plan/hardware.py): an assumption, which favours allgather.
    """
    rows = []
    for backend in EXCHANGES:
        other = job.with_backend(backend)
        flows = traffic_lib.exchanges(other)
        loads = [(flow.times, flow.load(job.mesh, hardware.node)) for flow in flows]
        rows.append(
            [
                backend + (", dropless" if other.dropless else ", fixed capacity"),
                f"{sum(times * load.inside for times, load in loads) / GB:.2f}",
                f"{sum(times * load.outside for times, load in loads) / GB:.2f}",
                f"{1e3 * sum(times * load.seconds(hardware) for times, load in loads):.1f}",
            ]
        )
    header = ["back-end", "NVLink GB", "network GB", "ms"]
    return table("exchange with the experts in a step", header, rows)


def overlap(step: Step) -> str:
    """Traffic against what hides it."""
    rows = [
        [
            exposure.behind + (", backward" if exposure.backward else ", forward"),
            f"{1e3 * exposure.traffic:.1f}",
            f"{1e3 * exposure.window:.1f}",
            f"{1e3 * exposure.seconds:.1f}",
        ]
        for exposure in step.exposures
    ]
    title = "traffic against the work that hides it, ms of a step"
    return table(title, ["work", "traffic", "work", "waited for"], rows)


def time(step: Step, hardware: Hardware) -> str:
    """The predicted step."""
    waits = sum(exposure.seconds for exposure in step.exposures)
    rows = [
        ["blocks", f"{step.blocks:.4g} s"],
        ["loss, MTP layer, lookups", f"{step.loss:.4g} s"],
        ["optimizer", f"{step.optimizer:.4g} s"],
        ["waiting for traffic", f"{waits:.4g} s"],
        ["step", f"{step.seconds:.4g} s"],
        ["tokens per second", f"{step.tokens_per_second:.4g}"],
        ["MFU", f"{100 * step.mfu:.1f}%"],
    ]
    return table(
        f"predicted step on {hardware.name} (plan/hardware.py says at what rates)", ["", ""], rows
    )


def decoding(job: Job, devices: int, hardware: Hardware) -> str:
    """Bounds on decoding."""
    context = job.config.train.sequence_length
    found = decoding_lib.decoding(job.model, devices, context, hardware)
    title = (
        f"decoding on {devices} {hardware.name} at context {context}, no faster than memory "
        f"({hardware.dollars_per_hour:g} $ per device and hour)"
    )
    if not found:
        return f"{title}: weights and one sequence do not fit"
    rows = [
        [
            str(one.batch),
            f"{1e3 * one.seconds:.3g}",
            f"{one.tokens_per_second:.4g}",
            f"{one.tokens_per_second * one.batch:.4g}",
            f"{one.dollars:.3g}",
        ]
        for one in found
    ]
    header = ["sequences a device", "ms a token", "tokens/s per user", "tokens/s a device"]
    return table(title, [*header, "$ per million"], rows)
