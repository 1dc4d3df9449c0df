"""The page of a run: final figures, the picture, the configuration, in one html file."""

import base64
import html
from collections.abc import Mapping
from typing import Any

import numpy as np

from longcat_jax import config as config_lib
from longcat_jax import metrics
from longcat_jax.report.run import Run, finite

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1200px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { width: 100%; height: auto; }
table { border-collapse: collapse; }
td { padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid #e5e5e5; vertical-align: top; }
td:last-child { font-variant-numeric: tabular-nums; }
summary { cursor: pointer; }
"""


def render_page(run: Run, png: bytes) -> str:
    """The page as html that refers to nothing outside of itself.

    Raises:
      ValueError: metrics that aren't numbers.
    """
    picture = base64.b64encode(png).decode("ascii")
    title = html.escape(f"LongCat-Flash run {run.name}")
    settings = _flatten(config_lib.to_mapping(run.config))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            "<h2>Figures</h2>",
            _table(final_figures(run)),
            "<h2>Plots</h2>",
            f'<img alt="Curves of the run" src="data:image/png;base64,{picture}">',
            "<h2>Configuration</h2>",
            f"<details><summary>all {len(settings)} fields</summary>{_table(settings)}</details>",
            "</body></html>",
            "",
        ]
    )


def _table(rows: Mapping[str, Any]) -> str:
    cells = [
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    ]
    return "<table>" + "".join(cells) + "</table>"


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def final_figures(run: Run) -> dict[str, str]:
    """Name -> text of the table of results; what a run has not measured is left out."""
    table = {}
    config = run.config
    steps = int(max(row["step"] for row in run.rows))
    tokens = steps * config.train.global_batch * config.train.sequence_length
    table["steps"] = f"{steps} of {config.train.steps}"
    table["tokens in batches"] = metrics.quantity(tokens)
    table |= _quality(run)

    model = config.model
    experts = _last_mean(run, "experts_per_token", 50)
    if experts is not None:
        away = experts / model.moe_topk_real - 1
        table["real experts per token, last 50 steps"] = (
            f"{experts:.3f} (target {model.moe_topk_real:g}, {away:+.1%})"
        )
    for name, key in (("layers' mean", "max_load_mean"), ("worst layer", "max_load")):
        load = _last_mean(run, key, 20)
        if load is not None:
            table[f"max / mean expert load, {name}, last 20 steps"] = f"{load:.2f}"
    _, speed = run.curve("tokens_per_second")
    if finite(speed).size:
        table["tokens per second, median"] = metrics.quantity(float(np.nanmedian(speed)))
    _, seconds = run.curve("step_seconds")
    if finite(seconds).size:
        table["time in steps"] = metrics.duration(float(np.nansum(seconds)))
    wait = _last_mean(run, "input_wait", len(run.rows))
    if wait is not None:
        table["share of time waiting for data"] = f"{wait:.2%}"
    if run.availability:
        table["availability"] = run.availability
    return table


def _quality(run: Run) -> dict[str, str]:
    table = {}
    loss = _last_mean(run, "loss", 50)
    if loss is not None:
        table["training loss, mean of last 50 steps"] = f"{loss:.4f} nats per token"
    steps, bits = run.curve("eval/bits_per_byte")
    good = np.isfinite(bits)
    if good.any():
        last, best = bits[good][-1], int(np.nanargmin(bits))
        table["validation, last"] = f"{last:.4f} bits per byte"
        table["validation, best"] = f"{bits[best]:.4f} bits per byte at step {steps[best]:.0f}"
        for name, value in run.baselines.items():
            table[f"{name}, same text"] = f"{value:.4f} bits per byte (run: {last - value:+.4f})"
    return table


def _last_mean(run: Run, key: str, count: int) -> float | None:
    _, values = run.curve(key)
    values = finite(values[-count:])
    return float(values.mean()) if values.size else None
