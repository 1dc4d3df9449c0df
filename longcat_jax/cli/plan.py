"""`longcat plan`: parameters, memory, traffic and time of a configuration, without running it.

Everything comes from shapes (`jax.eval_shape`) and formulas: a 560 B model is planned on a laptop.
With --devices the mesh, the number of micro-batches and, where parallel.expert_backend is auto, the
way to the experts with the shortest predicted step are proposed, unless the configuration's own
mesh has that many devices. What is gathered between nodes is taken to enter each of them once.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from longcat_jax.cli.config_file import OVERRIDES, load_config
from longcat_jax.config import Config, ConfigError, from_mapping, override, to_mapping

MOST_DEVICES = 8 * 4096
"""Most devices that are planned for."""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's options."""
    parser = subparsers.add_parser("plan", description=__doc__, epilog=OVERRIDES)
    parser.add_argument(
        "--config",
        required=True,
        help="a configs/*.py file, a config.json of a run, or a HuggingFace checkpoint's folder",
    )
    parser.add_argument("--devices", type=int, help="how many; a mesh is proposed")
    parser.add_argument("--hardware", default="h100", help="h100 (default), h800, h200 or a100")
    parser.set_defaults(run=run, overrides=[])


def load_job(path: str, overrides: Sequence[str]) -> Config:
    """The configuration of a file, or a model from a HuggingFace folder in a job of the usual size:
    steps of 4096 rows of up to 8192 tokens.

    Raises:
      ConfigError, HFError: anything wrong with it.
    """
    if not Path(path).is_dir():
        return load_config(path, overrides)
    from longcat_jax.config import DTYPES
    from longcat_jax.hf import config as hf_config

    raw = hf_config.read_raw(Path(path))
    named = [raw.get(key) for key in ("dtype", "torch_dtype")]
    dtype = next((name for name in named if name in DTYPES), "bfloat16")
    mtp = bool(raw.get("num_nextn_predict_layers", 1))
    model = hf_config.parse(raw, dtype=dtype, mtp=mtp)
    length = min(8192, model.max_position_embeddings)
    train = dict(steps=1, global_batch=4096, sequence_length=length, remat="full")
    job = dict(model=to_mapping(model), train=train, optim=dict(learning_rate=1e-3))
    return override(from_mapping(job), overrides)


def plan(config: Config) -> list[tuple[str, str]]:
    """(what, how much) rows; nothing is allocated."""
    import jax

    from longcat_jax.model import count
    from longcat_jax.plan.memory import abstract_mesh, bytes_per_device
    from longcat_jax.plan.tables import amount
    from longcat_jax.train_step import abstract_state

    model, length = config.model, config.train.sequence_length
    state = abstract_state(config, abstract_mesh(config.mesh))
    rows = [
        ("parameters", amount(count.total_parameters(model))),
        ("MTP head, its embedding included", amount(count.mtp_parameters(model), 3)),
    ]
    for real in sorted({0.0, model.moe_topk_real, float(model.moe_topk)}):
        active = count.active_parameters(model, real)
        rows.append((f"active per token with {real:g} real experts", amount(active)))
    flops = count.training_flops_per_token(model, length)
    tokens = config.train.global_batch * length
    leaves = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
    return [
        *rows,
        (f"training work per token at length {length}", f"{flops / 1e9:.2f} GFLOP"),
        ("tokens per step", f"{tokens / 1e6:.3g} M"),
        ("work of the whole run", f"{flops * tokens * config.train.steps:.3g} FLOP"),
        ("devices in the mesh", str(config.mesh.num_devices)),
        ("stored parameters", amount(leaves, 3)),
        ("master weights per device", f"{bytes_per_device(state.params) / 1e9:.3g} GB"),
        (
            "blocks' weights in the compute dtype per device",
            f"{bytes_per_device(state.copies) / 1e9:.3g} GB",
        ),
        ("optimizer state per device", f"{bytes_per_device(state.opt_state) / 1e9:.3g} GB"),
    ]


def run(args: argparse.Namespace) -> None:
    """Prints the plan."""
    config = load_job(args.config, args.overrides)
    if args.devices is not None and not 1 <= args.devices <= MOST_DEVICES:
        raise ConfigError(f"--devices={args.devices}: must be from 1 to {MOST_DEVICES}")
    from longcat_jax.plan import decoding, hardware, memory, search, tables, training
    from longcat_jax.plan.job import Job

    machine, job, proposed = hardware.find(args.hardware), Job(config), ""
    if args.devices not in (None, config.mesh.num_devices):
        job = search.propose(config, args.devices, machine)
        proposed = f"proposed: {tables.mesh_text(job.mesh)} train.accumulate={job.micro_batches}"
        if job.mesh.expert > 1:
            proposed += f" parallel.expert_backend={job.backend}"
    rows = plan(job.config)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    found, step = memory.memory(job), training.step(job, machine)
    serving = args.devices or job.mesh.num_devices
    if serving == 1:
        serving = decoding.least_devices(job.model, config.train.sequence_length, machine)
    rows_that_fit = search.largest_batch(job, machine)
    sections = [
        *([proposed] if proposed else []),
        tables.parts(job),
        tables.memory(found, machine)
        + f"\n  rows of {config.train.sequence_length} tokens that fit a micro-batch of a device: "
        f"{rows_that_fit} (planned: {job.rows_per_device})",
        *([tables.traffic(job, machine)] if job.mesh.num_devices > 1 else []),
        *([tables.backends(job, machine)] if job.mesh.expert > 1 else []),
        *([tables.overlap(step)] if step.exposures else []),
        tables.time(step, machine),
        tables.decoding(job, serving, machine),
    ]
    print()
    print("\n\n".join(sections))
