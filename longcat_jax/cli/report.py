"""`longcat report`: plots and final figures of a run."""

import argparse


def register(subparsers: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = subparsers.add_parser(
        "report",
        description="Write report.html (one file, opens without a network) and report.png.",
    )
    parser.add_argument("--workdir", required=True, help="the workdir of a training run")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from longcat_jax import report

    for path in report.write_report(args.workdir):
        print(f"wrote {path}")
