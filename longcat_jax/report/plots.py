"""The picture of a run: one panel a question, drawn without pyplot's global state.

Letters: L layers, X experts of one kind, E real and identity experts together.
"""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator

from longcat_jax.report.run import Run, finite

# Okabe and Ito's palette, which colour-blind readers tell apart; pairs differ in lightness too.
BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#777777",
)
MISSING = "not in this run's metrics"
MAX_POINTS = 1500
"""Longer curves are averaged down to this many points."""
BALANCE_LIMIT = 0.1
"""R_g should stay below this (arXiv 2509.01322, section 2.2.3)."""


def render(run: Run) -> bytes:
    """The picture as PNG data; errors as in `draw`."""
    buffer = io.BytesIO()
    draw(run).savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def draw(run: Run) -> Figure:
    """The picture.

    Raises:
      ValueError: metrics that aren't numbers.
    """
    figure = Figure(figsize=(15, 16.5), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.09)
    model = run.config.model
    figure.suptitle(
        f"{run.name}: {model.num_layers} blocks of width {model.hidden_size}, "
        f"{model.n_routed_experts} real + {model.zero_expert_num} identity experts, "
        f"{model.moe_topk} selected per token, {model.moe_topk_real:g} of them real on average",
        fontsize=14,
        fontweight="bold",
    )
    parts = figure.subfigures(4, 1, height_ratios=(1, 1, 1, 0.9))
    rows = (
        (_draw_loss, _draw_bits, _draw_rates),
        (_draw_experts, _draw_histogram, _draw_max_load),
        None,
        (_draw_gradient, _draw_speed, _draw_cosine, _draw_balance),
    )
    for part, draws in zip(parts, rows, strict=True):
        if draws is None:
            _draw_heat_map(part, run)
            continue
        for axes, panel in zip(part.subplots(1, len(draws)), draws, strict=True):
            _style(axes)
            panel(axes, run)
            if axes.get_legend_handles_labels()[0]:
                # Both rates fall; the best place would be sought without the right axis' curve.
                place = "upper right" if panel is _draw_rates else "best"
                axes.legend(loc=place, fontsize=9, framealpha=0.8, edgecolor="none")
            elif not axes.has_data():
                _say_missing(axes)
    return figure


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("optimizer step")


def _say_missing(axes: Axes) -> None:
    axes.text(0.5, 0.5, MISSING, transform=axes.transAxes, ha="center", color=GREY)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Averages of neighbours, so that at most MAX_POINTS are left."""
    width = math.ceil(len(x) / MAX_POINTS)
    if width <= 1:
        return x, y
    starts = np.arange(0, len(x), width)
    counts = np.diff([*starts, len(x)])
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over 2% of the curve, NaN left out."""
    half = max(1, len(values) // 100)
    good = np.isfinite(values)
    kernel = np.ones(2 * half + 1)
    sums = np.convolve(np.where(good, values, 0), kernel)[half:-half]
    counts = np.convolve(good, kernel)[half:-half]
    return np.where(good, sums / np.maximum(counts, 1), np.nan)


def _line(axes: Axes, run: Run, key: str, label: str, *, color: str, noisy: bool = True) -> None:
    """A curve; a noisy one pale, with its running mean on top."""
    x, y = thin(*run.curve(key))
    if not np.isfinite(y).any():
        return
    if noisy and len(x) > 30:
        axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        y = smooth(y)
    # One point alone makes no line.
    marker = "o" if len(x) == 1 else None
    axes.plot(x, y, color=color, linewidth=1.8, marker=marker, label=label)


def _points(axes: Axes, run: Run, key: str, label: str) -> None:
    x, y = run.curve(key)
    if np.isfinite(y).any():
        axes.plot(x, y, "o-", color=ORANGE, markersize=5, linewidth=1.5, label=label)


def _zoom(axes: Axes, curves: Sequence[np.ndarray]) -> None:
    """Leave the first steps' heights out of sight where they would flatten the rest."""
    values = np.concatenate([finite(np.asarray(curve, dtype=float)) for curve in curves])
    if values.size:
        low, high = values.min(), np.quantile(values, 0.97)
        margin = 0.08 * (high - low) + 1e-3 * abs(high)
        axes.set_ylim(low - margin, high + margin)


def _draw_loss(axes: Axes, run: Run) -> None:
    axes.set_title("Loss")
    axes.set_ylabel("cross-entropy, nats per token")
    _line(axes, run, "loss", "training", color=BLUE)
    if (run.curve("mtp_loss")[1] > 0).any():  # 0: a job without the head
        _line(axes, run, "mtp_loss", "training, two tokens ahead (MTP)", color=SKY)
    _points(axes, run, "eval/loss", "validation")


def _draw_bits(axes: Axes, run: Run) -> None:
    axes.set_title("Compression")
    axes.set_ylabel("bits per byte")
    _line(axes, run, "bits_per_byte", "training", color=BLUE)
    _points(axes, run, "eval/bits_per_byte", "validation")
    curves = [run.curve("bits_per_byte")[1], run.curve("eval/bits_per_byte")[1]]
    _zoom(axes, [*curves, np.array(list(run.baselines.values()))])
    styles = ("--", ":", "-.")
    for index, (name, value) in enumerate(run.baselines.items()):
        above = " (above)" if value > axes.get_ylim()[1] else ""
        label = f"{name} {value:.2f}{above}"
        axes.axhline(value, color="black", linestyle=styles[index % 3], linewidth=1.2, label=label)


def _draw_rates(axes: Axes, run: Run) -> None:
    axes.set_title("Learning rate and controller gain")
    axes.set_ylabel("learning rate", color=BLUE)
    _line(axes, run, "learning_rate", "learning rate", color=BLUE, noisy=False)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    x, mu = run.curve("pid_mu")
    if len(x):
        other = axes.twinx()
        other.spines["top"].set_visible(False)
        other.set_ylabel("mu of the router bias", color=ORANGE)
        other.plot(x, mu, color=ORANGE, linestyle="--", linewidth=1.8)
        other.set_ylim(bottom=0)
        axes.plot([], [], color=ORANGE, linestyle="--", linewidth=1.8, label="mu (right)")


def _draw_experts(axes: Axes, run: Run) -> None:
    target = run.config.model.moe_topk_real
    axes.set_title("Real experts per token")
    axes.set_ylabel("mean over tokens and layers")
    x, mean = thin(*run.curve("experts_per_token"))
    _line(axes, run, "experts_per_token", "training", color=BLUE)
    x_std, std = thin(*run.curve("experts_per_token_std"))
    if len(x) and np.array_equal(x, x_std):
        low, high = mean - std, mean + std
        axes.fill_between(
            x, low, high, color=BLUE, alpha=0.12, linewidth=0, label="1 std of tokens"
        )
    _points(axes, run, "eval/experts_per_token", "validation")
    if axes.has_data():
        axes.axhline(target, color="black", linestyle="--", label=f"target K_e = {target:g}")


def _draw_histogram(axes: Axes, run: Run) -> None:
    model = run.config.model
    axes.set_title("Real experts of a token")
    axes.set_xlabel("real experts among the selected")
    axes.set_ylabel("share of tokens, %")
    if run.load is None:
        return
    shares = run.load.histogram * 100
    counts = np.arange(len(shares))
    bars = axes.bar(counts, shares, color=BLUE, width=0.8)
    if len(shares) <= 16:
        axes.bar_label(bars, fmt="%.0f", fontsize=9, padding=2)
        axes.set_xticks(counts)
    mean = float(counts @ shares) / 100
    step = run.load.step
    axes.set_title(f"Real experts of a token, step {step}: mean {mean:.2f} of {model.moe_topk}")
    axes.margins(y=0.1)
    axes.grid(False, axis="x")


def _draw_max_load(axes: Axes, run: Run) -> None:
    axes.set_title("Busiest real expert")
    axes.set_ylabel("load, max / mean of a layer")
    _line(axes, run, "max_load", "worst layer", color=ORANGE)
    _line(axes, run, "max_load_mean", "mean over layers", color=BLUE)
    if axes.has_data():
        axes.axhline(1, color="black", linestyle="--", linewidth=1, label="perfect balance")
        _zoom(axes, [run.curve("max_load")[1], np.ones(1)])


def _draw_gradient(axes: Axes, run: Run) -> None:
    axes.set_title("Gradient norm")
    axes.set_ylabel("global norm before clipping")
    _line(axes, run, "grad_norm", "gradient", color=BLUE)
    if axes.has_data():
        clip = run.config.optim.clip_norm
        axes.axhline(clip, color="black", linestyle="--", linewidth=1, label=f"clipped at {clip:g}")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_minor_formatter("{x:g}")


def _draw_speed(axes: Axes, run: Run) -> None:
    axes.set_title("Speed")
    axes.set_ylabel("tokens per second")
    _line(axes, run, "tokens_per_second", "training", color=GREEN)
    if axes.has_data():
        high = float(np.nanquantile(run.curve("tokens_per_second")[1], 0.99))
        axes.set_ylim(0, 1.15 * high)


def _by_layer(axes: Axes, run: Run, key: str) -> bool:
    x, values = run.curve(key)
    if values.ndim != 2 or not np.isfinite(values).any():
        return False
    low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
    axes.fill_between(x, low, high, color=PURPLE, alpha=0.3, linewidth=0, label="all layers")
    axes.plot(x, np.nanmean(values, axis=1), "o-", color=PURPLE, markersize=4, label="mean")
    return True


def _draw_cosine(axes: Axes, run: Run) -> None:
    axes.set_title("Likeness of router rows")
    axes.set_ylabel("mean pairwise cosine")
    _by_layer(axes, run, "router/cosine")


def _draw_balance(axes: Axes, run: Run) -> None:
    axes.set_title("Pull of the balance loss")
    axes.set_ylabel("R_g, ratio of gradients at the router")
    if _by_layer(axes, run, "router/balance_ratio"):
        label = f"keep below {BALANCE_LIMIT:g}"
        axes.axhline(BALANCE_LIMIT, color="black", linestyle="--", linewidth=1, label=label)
        axes.set_ylim(0, 1.5 * max(axes.get_ylim()[1], BALANCE_LIMIT))


def _draw_heat_map(part: SubFigure, run: Run) -> None:
    """Load over its target per layer and expert, identity experts in a panel of their own."""
    model = run.config.model
    experts, identity = model.n_routed_experts, model.zero_expert_num
    panels = [("real experts", slice(0, experts), model.moe_topk_real / experts)]
    if identity:
        left = model.moe_topk - model.moe_topk_real
        panels.append(("identity experts", slice(experts, None), left / identity))
    widths = [experts, identity][: len(panels)]
    grid = part.subplots(
        1, len(panels), width_ratios=widths, squeeze=False, gridspec_kw={"wspace": 0.02}
    )[0]
    if run.load is None:
        for axes, (name, _, _) in zip(grid, panels, strict=True):
            axes.set_title(f"Load of {name}")
            _say_missing(axes)
        return
    image = None
    for axes, (name, columns, target) in zip(grid, panels, strict=True):
        # A target of 0 (every selection real) leaves nothing to compare with.
        share_LX = run.load.load_LE[:, columns] * model.moe_topk / (target or 1)
        image = axes.imshow(share_LX, aspect="auto", cmap="PuOr_r", vmin=0, vmax=2)
        axes.set_title(f"Load of {name} at step {run.load.step}")
        axes.set_xlabel("expert")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        if share_LX.size <= 160:
            for (row, column), value in np.ndenumerate(share_LX):
                color = "white" if abs(value - 1) > 0.7 else "black"
                axes.text(
                    column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color
                )
    grid[0].set_ylabel("layer")
    for axes in grid[1:]:
        axes.tick_params(labelleft=False)
    bar = part.colorbar(image, ax=list(grid), extend="max", pad=0.01)
    bar.set_label("selections / target (1: as planned)")
