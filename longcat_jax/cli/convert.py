"""`longcat convert`: HuggingFace checkpoints to ours and back (docs/converting.md)."""

import argparse
import re
import sys
from typing import Any

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
DTYPES = ("bfloat16", "float16", "float32", "float64")


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if not found or found[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r}: write a size such as 5GB or 500MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def _shared_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", help="a folder to make (not needed with --check)")
    parser.add_argument("--dtype", choices=DTYPES, help="convert to it (default: keep)")
    parser.add_argument(
        "--slice", help="keep a part: layers=0:2,experts=0:64, or one of the two; numbered from 0"
    )
    parser.add_argument(
        "--check", action="store_true", help="only compare names, shapes and dtypes; write nothing"
    )
    parser.add_argument("--threads", type=int, default=4, help="tensors moved at the same time")
    parser.add_argument(
        "--process", default="0/1", metavar="I/N", help="convert share I of N (several machines)"
    )


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser("convert", description=__doc__)
    directions = parser.add_subparsers(
        dest="direction", required=True, parser_class=type(parser), metavar="from_hf | to_hf"
    )
    importer = directions.add_parser("from_hf", description="HuggingFace folder -> checkpoint.")
    importer.add_argument("--hf_dir", required=True, help="config.json and safetensors files")
    _shared_options(importer)
    importer.set_defaults(run=_from_hf)
    exporter = directions.add_parser("to_hf", description="Checkpoint -> HuggingFace folder.")
    exporter.add_argument(
        "--checkpoint", required=True, help="a workdir, or one of its checkpoints"
    )
    exporter.add_argument(
        "--layout",
        default="release",
        choices=("release", "transformers"),
        help="release: as published, for vLLM and SGLang; transformers: what transformers >= 5 "
        "loads, zero rows added",
    )
    exporter.add_argument(
        "--shard_size", type=_size, default=_size("5GB"), help="of a file at most"
    )
    _shared_options(exporter)
    exporter.set_defaults(run=_to_hf)


def _common(args: argparse.Namespace) -> dict[str, Any]:
    from longcat_jax.hf import selection, transfer

    share = re.fullmatch(r"(\d+)/(\d+)", args.process)
    if not share or int(share[1]) >= int(share[2]):
        raise ValueError(f"--process={args.process}: write I/N with I from 0 to N - 1")
    if args.threads < 1:
        raise ValueError(f"--threads={args.threads}: must be >= 1")
    if not args.output and not args.check:
        raise ValueError("--output is missing (only --check does without)")
    return {
        "selection": selection.parse(args.slice) if args.slice else selection.Selection(),
        "workers": transfer.Workers(args.threads, int(share[1]), int(share[2])),
    }


def _from_hf(args: argparse.Namespace) -> None:
    from longcat_jax.hf import from_hf

    common = _common(args)
    if args.check and args.dtype:
        raise ValueError("--dtype: --check compares the files as they are; leave it out")
    if args.check:
        print(from_hf.check(args.hf_dir, selection=common["selection"]))
        return
    _report(from_hf.from_hf(args.hf_dir, args.output, dtype=args.dtype, **common), args.output)


def _to_hf(args: argparse.Namespace) -> None:
    from longcat_jax.hf import to_hf

    common = _common(args)
    target = to_hf.Target(args.layout, args.dtype, args.shard_size)
    if args.check:
        print(to_hf.check(args.checkpoint, target=target, selection=common["selection"]))
        return
    result = to_hf.to_hf(args.checkpoint, args.output, target=target, **common)
    _report(result, args.output)


def _report(result: Any, output: str) -> None:
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    rate = result.moved_bytes / 1e6 / max(result.seconds, 1e-9)
    moved = f"{result.moved_bytes / 1e6:.1f} MB in {result.seconds:.1f} s ({rate:.0f} MB/s)"
    if result.finished:
        print(f"{output}: {result.tensors} tensors; {moved}")
    else:
        print(f"{output}: this process' share is done; {moved}; others are at work")
