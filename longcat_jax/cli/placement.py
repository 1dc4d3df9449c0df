"""Which process of which job this is: from the command line, or from SLURM's variables."""

import argparse
import dataclasses
import re
from collections.abc import Mapping

FLAGS = ("coordinator", "num_processes", "process_id")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
"""What srun sets in each of its tasks."""
SLURM_PORTS = range(15000, 25000)
"""Below the ports that systems hand out by themselves."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """A process' place in a job that something else starts and restarts."""

    coordinator: str
    """HOST:PORT of process 0."""
    processes: int
    index: int


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a process of many."""
    group = parser.add_argument_group(
        "several processes", "each runs this same command; srun's tasks need none of these options"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, metavar="N", help="of the whole job")
    group.add_argument("--process_id", type=int, metavar="I", help="of this process, from 0")


def find(args: argparse.Namespace, environ: Mapping[str, str]) -> Placement | None:
    """This process' place; None for a process that nobody placed.

    Raises:
      ValueError: options that don't make one.
    """
    given = [getattr(args, name) for name in FLAGS]
    if given == [None] * 3:
        return _in_slurm(environ)
    if None in given:
        missing = ", ".join(f"--{name}" for name in FLAGS if getattr(args, name) is None)
        raise ValueError(f"{missing}: missing; a process of a job needs all three")
    coordinator, processes, index = given
    port = re.fullmatch(r".+:([0-9]+)", coordinator)
    if not port or not 1 <= int(port[1]) <= 65535:
        raise ValueError(f"--coordinator={coordinator}: must be HOST:PORT, PORT from 1 to 65535")
    if processes < 1:
        raise ValueError(f"--num_processes={processes}: must be at least 1")
    if not 0 <= index < processes:
        raise ValueError(
            f"--process_id={index}: must be from 0 to --num_processes - 1 = {processes - 1}"
        )
    return Placement(coordinator, processes, index)


def _in_slurm(environ: Mapping[str, str]) -> Placement | None:
    if not all(name in environ for name in SLURM):
        return None
    job, nodes, tasks, index = (environ[name] for name in SLURM)
    # "node7,node9" or "node[07-12,15],other": the first host runs task 0.
    first = re.match(r"(\[[^]]*\]|[^,[])+", nodes)[0]
    host = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)
    port = SLURM_PORTS[int(job) % len(SLURM_PORTS)]
    return Placement(f"{host}:{port}", int(tasks), int(index))
