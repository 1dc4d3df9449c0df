"""Compiles the Hopper kernels that multiply to machine code, on a machine without a GPU, and reads
it. A program of its own: where kernels are dumped is settled when JAX starts.

    python -m tests.kernels.machine_code FOLDER     prints {kernel: what was found} as JSON

Needs the extra [aot].
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ |= {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS")}
    os.environ["MOSAIC_GPU_DUMP_TO"] = sys.argv[1]

import jax
import jax.numpy as jnp

from longcat_jax.plan.deviceless import h100s
from pallas_kernels import (
    HOPPER,
    expand_values,
    flash_mla,
    grouped_gemm,
    grouped_gemm_fp8,
    made_for,
    mla_decode,
    skinny_experts,
    skinny_gemm,
    skinny_swiglu,
)
from pallas_kernels.flash_mla import shapes as attention_shapes
from pallas_kernels.grouped_gemm import shapes as grouped_shapes
from pallas_kernels.mla_decode import shapes as decode_shapes
from pallas_kernels.skinny_ffn import shapes as ffn_shapes
from pallas_kernels.skinny_gemm import shapes as skinny_shapes
from tests.kernels import sass

SPILLS = re.compile(r"(\d+) bytes spill stores")


@functools.cache
def tool(name: str) -> str:
    """Path of a program of the CUDA toolkit, the newest on PATH, in the toolkit's usual place or in
    a package: XLA may have written for any of them.
    """
    folders = [Path("/usr/local/cuda/bin")]
    if spec := find_spec("nvidia"):
        folders += [
            bin for root in spec.submodule_search_locations for bin in Path(root).glob("*/bin")
        ]
    found = [shutil.which(name), *(shutil.which(name, path=folder) for folder in folders)]
    found = list(filter(None, found))
    if not found:
        raise SystemExit(f"{name}: not on PATH, not in /usr/local/cuda/bin, not in a package")

    def release(path: str) -> tuple[int, ...]:
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        numbers = re.search(r"release (\d+)\.(\d+)", text)
        return tuple(map(int, numbers.groups())) if numbers else (0, 0)

    return max(found, key=release)


def machine_code(ptx: Path) -> str:
    """What ptxas makes of a kernel, disassembled."""
    cubin = ptx.with_suffix(".cubin")
    build = [tool("ptxas"), "-arch", "sm_90a", "-O3", str(ptx), "-o", str(cubin)]
    subprocess.run(build, check=True, capture_output=True)
    read = [tool("nvdisasm"), "-c", str(cubin)]
    return subprocess.run(read, check=True, capture_output=True, text=True).stdout


def programs() -> dict[str, tuple[Any, list[tuple[tuple[int, ...], Any]]]]:
    """Name -> (function, shapes and dtypes of its arguments): the production shapes."""
    kinds = attention_shapes, grouped_shapes, decode_shapes, skinny_shapes
    attention, gemm, decode, skinny = (shapes.PRODUCTION[0] for shapes in kinds)

    def attend(q: Any, k: Any, v: Any, rope: Any, dout: Any, ids: Any = None) -> Any:
        def run(q: Any, k: Any, v: Any, rope: Any) -> Any:
            return flash_mla(
                q, k, v, scale=0.07, k_rope=rope, segment_ids=ids, implementation="mosaic"
            )

        out, vjp = jax.vjp(run, q, k, v, rope)
        return out, *vjp(dout)

    def multiply(lhs: Any, rhs: Any, dout: Any, sizes: Any) -> Any:
        out, vjp = jax.vjp(lambda lhs, rhs: grouped_gemm(lhs, rhs, sizes), lhs, rhs)
        return out, *vjp(dout)

    def attend_over_cache(q: Any, cache: Any, lengths: Any) -> Any:
        return mla_decode(q, cache, lengths, scale=0.07, value_dim=decode.latent)

    def floats(*shapes: tuple[int, ...]) -> list[tuple[tuple[int, ...], Any]]:
        return [(shape, jnp.bfloat16) for shape in shapes]

    a, g, d = attention, gemm, decode
    tokens, entry = (a.batch, a.tokens), d.latent + d.rope
    widths = a.nope + a.rope, a.nope, a.value
    whole = [*((*tokens, a.heads, width) for width in widths), (*tokens, a.rope)]
    whole = floats(*whole, (*tokens, a.heads, a.value))
    rows = floats((g.rows, g.contract), (g.groups, g.contract, g.width), (g.rows, g.width))
    cache = floats((d.batch, d.tokens, d.heads, entry), (d.batch, d.entries, entry))
    few = floats((skinny.rows, skinny.contracted), *((skinny.contracted, n) for n in skinny.widths))
    M, D, F, X, K = ffn_shapes.PRODUCTION[1]
    matrices = floats((X, D, 2 * F), (X, F, D))
    selected = [*floats((M, D), (M, K)), ((M, K), jnp.int32), *matrices]
    heads = floats((d.batch, d.heads, d.latent), (d.latent, d.heads, 256))
    fp8, blocks = jnp.float8_e4m3fn, (g.width // 128, g.contract // 128)
    quantized = [
        ((g.rows, g.contract), fp8),
        ((g.rows, blocks[1]), jnp.float32),
        ((g.groups, g.width, g.contract), fp8),
        ((g.groups, *blocks), jnp.float32),
        ((g.groups,), jnp.int32),
    ]
    return {
        "skinny": (skinny_gemm, few),
        "ffn": (skinny_swiglu, few),
        "experts": (skinny_experts, selected),
        "values": (functools.partial(expand_values, value_dim=128), heads),
        "attention": (attend, whole),
        "attention of segments": (attend, [*whole, (tokens, jnp.int32)]),
        "grouped": (multiply, [*rows, ((g.groups,), jnp.int32)]),
        "grouped in fp8": (grouped_gemm_fp8, quantized),
        "decode": (attend_over_cache, [*cache, ((d.batch,), jnp.int32)]),
    }


def main(folder: Path) -> None:
    """Compiles, disassembles, and prints what was found."""
    sharding = jax.sharding.SingleDeviceSharding(h100s(1)[0])
    found: dict[str, dict[str, Any]] = {}
    for program, (function, arguments) in programs().items():
        specs = [jax.ShapeDtypeStruct(s, dtype, sharding=sharding) for s, dtype in arguments]
        with made_for(HOPPER):
            jax.jit(function).trace(*specs).lower().compile()
        for ptx in sorted(folder.glob("*.ptx")):
            bodies = sass.loops_with_products(machine_code(ptx))
            spills = SPILLS.search(ptx.with_suffix(".ptxas").read_text())
            found[f"{program}: {ptx.stem}"] = {
                "loops": len(bodies),
                "spoilt": [one for body in bodies for one in sass.spoilt_products(body)],
                "spilt bytes": int(spills[1]) if spills else 0,
            }
            ptx.unlink()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
