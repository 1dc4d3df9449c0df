"""Compiles the released model's step for as many fake CPU devices as asked for, with the mesh that
the planner proposes; nothing of the model is allocated.

    python -m tests.plan.many_devices 1024      prints what was found as JSON
"""

import json
import sys
import time

import jax

from longcat_jax.cli.config_file import load_config
from longcat_jax.parallel import hlo
from longcat_jax.plan import hardware, search
from longcat_jax.plan.memory import abstract_arguments, memory
from longcat_jax.plan.traffic import flows
from longcat_jax.sharding import make_mesh
from longcat_jax.train_step import compile_train_step


def main(devices: int) -> None:
    """Proposes, compiles, compares."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    start = time.monotonic()
    machine = hardware.find("h100")
    job = search.propose(load_config("configs/flash_560b.py"), devices, machine)
    mesh = make_mesh(job.mesh)
    with jax.set_mesh(mesh):
        arguments = abstract_arguments(job.config, mesh)
        compiled = compile_train_step(job.config, mesh).lower(*arguments).compile()
    seconds = time.monotonic() - start
    stats, planned = compiled.memory_analysis(), memory(job)
    found = hlo.collectives(hlo.parse(compiled.as_text()), mesh.shape)
    expected: dict[str, int] = {}
    for flow in flows(job):
        key = f"{flow.kind} {' '.join(flow.axes)}"
        expected[key] = expected.get(key, 0) + flow.times * flow.payload
    result = {
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "micro_batches": job.micro_batches,
        "seconds": seconds,
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "planned_arguments": planned.arguments,
        "planned_temporaries": planned.temporaries,
        "traffic": {
            f"{kind} {' '.join(axes or ('?',))}": payload
            for (kind, axes), (_, payload) in hlo.totals(found).items()
        },
        "planned_traffic": expected,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]))
