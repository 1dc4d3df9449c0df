"""`longcat plan`: parameters, work per token and state per device of a configuration.

Everything comes from shapes (`jax.eval_shape`): a 560 B model is planned on a laptop.
"""

import argparse
import math
from typing import Any

from longcat_jax.cli.config_file import OVERRIDES, load_config
from longcat_jax.config import Config


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser("plan", description=__doc__, epilog=OVERRIDES)
    parser.add_argument("--config", required=True, help="a configs/*.py file or a config.json")
    parser.set_defaults(run=run, overrides=[])


def _bytes_per_device(abstract: Any) -> int:
    """Bytes that the fullest device holds of a tree of abstract, sharded arrays."""
    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(abstract)
    )


def plan(config: Config) -> list[tuple[str, str]]:
    """(what, how much) rows; nothing is allocated."""
    import jax
    from jax.sharding import AbstractMesh, AxisType

    from longcat_jax.config import MESH_AXES
    from longcat_jax.model import count
    from longcat_jax.train_step import abstract_state

    model, length = config.model, config.train.sequence_length
    sizes = tuple(getattr(config.mesh, name) for name in MESH_AXES)
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
    state = abstract_state(config, mesh)
    rows = [
        ("parameters", f"{count.total_parameters(model) / 1e9:.2f} B"),
        ("MTP head, its embedding included", f"{count.mtp_parameters(model) / 1e9:.3f} B"),
    ]
    for real in sorted({0.0, model.moe_topk_real, float(model.moe_topk)}):
        active = count.active_parameters(model, real)
        rows.append((f"active per token with {real:g} real experts", f"{active / 1e9:.2f} B"))
    flops = count.training_flops_per_token(model, length)
    tokens = config.train.global_batch * length
    leaves = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    return [
        *rows,
        (f"training work per token at length {length}", f"{flops / 1e9:.2f} GFLOP"),
        ("tokens per step", f"{tokens / 1e6:.3g} M"),
        ("work of the whole run", f"{flops * tokens * config.train.steps:.3g} FLOP"),
        ("devices in the mesh", str(config.mesh.num_devices)),
        ("stored parameters", f"{leaves / 1e9:.3f} B"),
        ("master weights per device", f"{_bytes_per_device(state.params) / 1e9:.3g} GB"),
        ("optimizer state per device", f"{_bytes_per_device(state.opt_state) / 1e9:.3g} GB"),
    ]


def run(args: argparse.Namespace) -> None:
    """Prints the plan."""
    rows = plan(load_config(args.config, args.overrides))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
