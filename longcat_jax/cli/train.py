"""`longcat train`: trains a model; the same command again goes on from the last checkpoint."""

import argparse
from pathlib import Path

from longcat_jax.cli.config_file import OVERRIDES, load_config


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
    parser.set_defaults(run=run, overrides=[])


def run(args: argparse.Namespace) -> None:
    """Trains."""
    config = load_config(args.config, args.overrides, directory=args.workdir)
    from longcat_jax.train import train  # after the config is known to be good: jax is slow

    train(config, args.workdir, profile=args.profile)
