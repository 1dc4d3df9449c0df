"""Losses of several runs in means over windows of steps: a table, and a picture of their distance.

    python -m experiments.compare_runs RUN [RUN ...] [--window=20] --output=losses.png

What tells whether a change of kernels, precision or mesh is smaller than a change of seed: the runs
are workdirs of `longcat train`, each compared with the first.
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from longcat_jax import metrics


def window_means(workdir: Path, window: int) -> np.ndarray:
    """Mean training loss of every whole window of steps from step 1 on.

    Raises:
      ValueError: the run has not one whole window, or a step's loss is missing or not a number.
    """
    rows = metrics.read_metrics(workdir)
    losses = {row["step"]: row["loss"] for row in rows if row.get("loss") is not None}
    count = len(losses) // window * window
    if not count:
        raise ValueError(f"{workdir}: {len(losses)} steps, not one window of {window}")
    if missing := set(range(1, count + 1)) - losses.keys():
        raise ValueError(f"{workdir}: no loss of step {min(missing)}")
    ordered = np.array([losses[step] for step in range(1, count + 1)])
    return ordered.reshape(-1, window).mean(axis=1)


def draw(means: dict[str, np.ndarray], window: int) -> Figure:
    """Losses on the left, distances to the first run on the right."""
    figure = Figure(figsize=(11, 4), layout="constrained", facecolor="white")
    losses, distances = figure.subplots(1, 2)
    first = next(iter(means.values()))
    steps = window * np.arange(1, len(first) + 1)
    for index, (name, values) in enumerate(means.items()):
        losses.plot(steps, values, marker="o", markersize=3, label=name, color=f"C{index}")
        if index:
            distance = np.abs(values - first)
            distances.semilogy(steps, distance, marker="o", markersize=3, color=f"C{index}")
    losses.set(title=f"Loss, means of {window} steps", ylabel="nats per token")
    distances.set(title=f"Distance to {next(iter(means))}", ylabel="nats per token")
    for axes in (losses, distances):
        axes.set_xlabel("last step of the window")
        axes.grid(alpha=0.3)
    losses.legend()
    return figure


def main() -> None:
    """Parses the command line, prints the table and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--window", type=int, default=20, help="steps")
    parser.add_argument("--output", type=Path, required=True, help="png")
    args = parser.parse_args()
    names = [run.resolve().name for run in args.runs]
    if len(set(names)) < len(names):
        parser.error(f"runs are called by their folders' names, which must differ: {names}")
    if args.window < 1:
        parser.error(f"--window={args.window}: must be at least 1")
    try:
        losses = [window_means(run, args.window) for run in args.runs]
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.touch()  # before anything is printed
    except (OSError, ValueError) as error:
        raise SystemExit(f"compare_runs: {error}") from error
    means = dict(zip(names, losses, strict=True))
    shortest = min(map(len, means.values()))
    means = {name: values[:shortest] for name, values in means.items()}
    first, *others = means
    print("step", first, *(f"{name} - {first}" for name in others), sep="\t")
    for index in range(shortest):
        apart = (f"{means[name][index] - means[first][index]:+.4f}" for name in others)
        step = (index + 1) * args.window
        print(step, f"{means[first][index]:.4f}", *apart, sep="\t")
    draw(means, args.window).savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
