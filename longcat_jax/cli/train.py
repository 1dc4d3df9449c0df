"""`longcat train`: trains a model; the same command again goes on from the last checkpoint."""

import argparse
import os
from pathlib import Path

from longcat_jax.cli import placement
from longcat_jax.cli.config_file import OVERRIDES, load_config

STOPPED_EARLY = 75
"""Exit status of a job's process that a signal stopped before the last step: start it again."""


def _interval(text: str) -> tuple[int, int]:
    start, _, stop = text.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be START:STOP, two steps")
    return int(start), int(stop)


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser("train", description=__doc__, epilog=OVERRIDES)
    parser.add_argument("--config", required=True, help="a configs/*.py file or a config.json")
    parser.add_argument("--workdir", required=True, type=Path, help="where everything is written")
    parser.add_argument(
        "--profile", type=_interval, metavar="START:STOP", help="trace these steps into WORKDIR"
    )
    placement.add_options(parser)
    parser.set_defaults(run=run, overrides=[])


def run(args: argparse.Namespace) -> int:
    """Trains, alone or as a process of a job."""
    place = placement.find(args, os.environ)
    if place is None or place.processes == 1:
        finished = _train(args)
    else:
        # Before jax is imported: the coordination service's own log repeats what we say.
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from longcat_jax.parallel.multihost import joined

        with joined(place.coordinator, place.processes, place.index):
            finished = _train(args)
    return 0 if finished or place is None else STOPPED_EARLY


def _train(args: argparse.Namespace) -> bool:
    config = load_config(args.config, args.overrides, directory=args.workdir)
    from longcat_jax.train import train  # after the config is known to be good: jax is slow

    return train(config, args.workdir, profile=args.profile)
