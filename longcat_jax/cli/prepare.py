"""`longcat prepare`: text files to a directory of tokenized records."""

import argparse
from pathlib import Path

DESCRIPTION = """\
Turn text files into tokenized training data: .txt and .jsonl (a field "text" on every line), also
as .gz or .zst. The directory is then a source for `longcat train`, by data.sources.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser("prepare", description=DESCRIPTION)
    option = parser.add_argument
    option(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="files, directories (searched through) or globs; may be repeated",
    )
    option("--output", type=Path, required=True, metavar="DIR", help="directory to make")
    option(
        "--tokenizer",
        default="",
        metavar="FILE",
        help="a byte-level tokenizer.json; without it one is trained on the text",
    )
    option("--vocab_size", type=int, default=32768, help="entries of the trained one (%(default)s)")
    option(
        "--validation",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of documents kept for validation (%(default)s)",
    )
    option("--bos_token_id", type=int, default=1, help="begins each document (%(default)s)")
    option("--eos_token_id", type=int, default=2, help="ends each document (%(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prepares the files and prints what came out."""
    from longcat_jax.data import SpecialIds, prepare

    manifest = prepare(
        args.input,
        args.output,
        tokenizer_path=args.tokenizer,
        vocab_size=args.vocab_size,
        validation=args.validation,
        ids=SpecialIds(args.bos_token_id, args.eos_token_id),
    )
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        print(
            f"{name}: {split.documents} documents, {split.tokens} tokens, {split.bytes} bytes, "
            f"{len(split.shards)} files"
        )
    print(
        f"train on it with --config.data.sources=\"{{'own': '{args.output}'}}\" "
        f"--config.model.vocab_size={manifest.vocab_size}"
    )
    return 0
