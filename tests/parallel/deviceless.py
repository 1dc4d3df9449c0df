"""Compiles a train step at the released model's widths for eight H100, on a machine without a GPU.

    python -m tests.parallel.deviceless [--config-key=value ...]   prints the overlap, then JSON

Needs the extra [aot].
"""

import json
import sys

from longcat_jax.cli.config_file import load_config
from longcat_jax.config import MESH_AXES
from longcat_jax.parallel import hlo
from longcat_jax.plan.deviceless import compiled_step
from longcat_jax.plan.job import Job
from longcat_jax.plan.memory import memory
from longcat_jax.plan.traffic import flows

# The released model with an eighth of its real experts (its router is as wide), two blocks and a
# small vocabulary.
SMALLER = (
    "model.num_layers=2",
    "model.n_routed_experts=64",
    "model.zero_expert_num=704",
    "model.vocab_size=16384",
    "model.num_nextn_predict_layers=0",
    "optim.balance.groups=8",
    "train.global_batch=8",
    "mesh.expert=8",
    "parallel.expert_backend=all_to_all",
    "parallel.dropless=False",
    "parallel.capacity_factor=1.0",
    "parallel.token_chunks=2",
)


def main(overrides: list[str]) -> None:
    """Compiles, and prints what was found and what was planned."""
    config = load_config("configs/flash_560b.py", [*SMALLER, *overrides])
    compiled = compiled_step(config)
    text = compiled.as_text()
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    found = hlo.collectives(hlo.parse(text), sizes)
    exchanges = [one for one in found if one.kind == "all-to-all"]
    print(hlo.overlap_table(exchanges))
    job, stats = Job(config), compiled.memory_analysis()
    planned: dict[str, int] = {}
    for flow in flows(job):
        key = f"{flow.kind} {' '.join(flow.axes)}"
        planned[key] = planned.get(key, 0) + flow.times * flow.payload
    result = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "planned_arguments": memory(job).arguments,
        "planned_temporaries": memory(job).temporaries,
        "traffic": {
            f"{kind} {' '.join(axes or ('?',))}": payload
            for (kind, axes), (_, payload) in hlo.totals(found).items()
        },
        "planned_traffic": planned,
        "exchanges": [
            {
                "times": one.times,
                "payload": one.payload,
                "received": one.received,
                "products": one.products,
                "asynchronous": one.asynchronous,
            }
            for one in exchanges
        ],
        "kernels": text.count('custom_call_target="mosaic_gpu'),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
