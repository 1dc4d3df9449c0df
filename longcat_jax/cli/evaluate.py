"""`longcat evaluate`: loss and bits per byte of a checkpoint on validation text."""

import argparse
import dataclasses
from pathlib import Path

from longcat_jax.baselines import BASELINES_FILE
from longcat_jax.config import Config, ModelConfig, OptimConfig, TrainConfig

LENGTH = 2048
"""Tokens a row where the checkpoint doesn't say."""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser("evaluate", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="a workdir, or one of its checkpoints")
    parser.add_argument("--data", help="a directory made by `longcat prepare` (default: the run's)")
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also fit n-gram models on what training saw, and run xz; written into the workdir",
    )
    parser.set_defaults(run=run)


def _evaluation_of(model: ModelConfig) -> Config:
    """A job for a converted checkpoint, which has none; only what evaluation reads of it counts."""
    rows = TrainConfig(
        steps=1, global_batch=8, sequence_length=min(model.max_position_embeddings, LENGTH)
    )
    return Config(model, rows, OptimConfig(learning_rate=1.0))


def _on_other_data(config: Config, path: str, tokenizer: Path) -> Config:
    if not Path(path).is_dir():
        raise ValueError(f"--data={path}: no such directory; `longcat prepare` makes one")
    if not tokenizer.is_file():
        raise ValueError(f"{tokenizer}: not there; without it text has no tokens")
    source = dataclasses.replace(
        config.data, sources={"data": path}, stages=(), tokenizer=str(tokenizer)
    )
    return dataclasses.replace(config, data=source)


def run(args: argparse.Namespace) -> None:
    """Prints the figures."""
    if args.data and args.baselines:
        raise ValueError("--baselines compares on the run's own data; leave --data out")
    import jax

    from longcat_jax import checkpoint, data, workdir
    from longcat_jax import evaluate as evaluation

    directory, step = checkpoint.locate(args.checkpoint)
    config = checkpoint.saved_config(args.checkpoint)
    if config is None and not args.data:
        raise ValueError(f"{args.checkpoint}: a converted checkpoint has no data; name --data")
    model = checkpoint.load(args.checkpoint)
    config = config or _evaluation_of(model.config)
    folder = directory / workdir.DATA
    if args.data:
        config = _on_other_data(config, args.data, directory / checkpoint.TOKENIZER)
    results, _, _ = evaluation.evaluate(
        model.params,
        evaluation.compile_evaluation(config),
        map(jax.device_put, data.open_validation(config, folder)),
        token_bytes_W=evaluation.token_sizes(config, folder),
    )
    print(f"step {step}: validation loss {results[checkpoint.METRIC]:.4f} nats per token")
    bits = results["eval/bits_per_byte"]
    print(f"bits per byte: model {bits:.3f}")
    if args.baselines:
        found = evaluation.measure_baselines(config, folder, step)
        checkpoint.write_json(directory / BASELINES_FILE, dataclasses.asdict(found))
        print(f"               bigram {found.bigram:.3f} (add-k, on what training saw)")
        print(f"               unigram {found.unigram:.3f}, xz -9 {found.xz:.3f}")
        print(f"the model is {found.bigram - bits:+.3f} bits per byte better than the bigram")
