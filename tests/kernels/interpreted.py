"""Runs the Mosaic kernels in Pallas' interpreter; prints one JSON object per case. A program of
its own: the interpreter blocks one of XLA's threads per warpgroup, and the number of threads,
NPROC, is read when JAX starts.

    NPROC=16 python -m tests.kernels.interpreted [CASE ...]

The cases in RACES are searched for races, in every kernel that they launch. Not seen are those
between clusters over global memory, since clusters run one after the other here; of a wgmma with
what overwrites its operands, since it is done at once; of a store by TMA with what is written into
its buffer next.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import (
    _mosaic,
    gather_rows,
    grouped_gemm,
    grouped_gemm_weight_gradient,
    mla_decode,
    scatter_add,
)
from pallas_kernels.grouped_gemm import mosaic as grouped_mosaic
from pallas_kernels.grouped_gemm.schedule import Tiling
from pallas_kernels.mla_decode import mosaic as decode_mosaic
from tests.kernels import (
    helpers,
    interpreted_add_norm,
    interpreted_ffn,
    interpreted_fp8,
    interpreted_heads,
    interpreted_norm,
    interpreted_skinny,
    interpreted_swiglu,
    register_wgmma,
    scatter_order,
)
from tests.kernels.interpreted_attention import ATTENTIONS, attention

NUM_SMS = 2
ROWS, CONTRACT, WIDTH = 228, 128, 320
GROUPS = {
    "uneven": (67, 0, 1, 20),
    "no rows": (0, 0),
    "unaligned": (7, 9, 203, 4, 1),
    "whole steps": (64, 0, 128),
}


def grouped(sizes: tuple[int, ...], dtype: Any = jnp.bfloat16) -> dict[str, Any]:
    """Relative errors of value and gradients; the rows past the sum hold NaN."""
    rng = np.random.default_rng(0)
    total = sum(sizes)
    shapes = (ROWS, CONTRACT), (len(sizes), CONTRACT, WIDTH), (ROWS, WIDTH)
    lhs, rhs, dout = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
    clean = [np.asarray(x, np.float64) for x in (lhs, rhs, dout)]
    clean[0][total:] = clean[2][total:] = 0
    out, dlhs, drhs = np.zeros((ROWS, WIDTH)), np.zeros((ROWS, CONTRACT)), np.zeros(rhs.shape)
    start = 0
    for g, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = clean[0][rows] @ clean[1][g]
        dlhs[rows] = clean[2][rows] @ clean[1][g].T
        drhs[g] = clean[0][rows].T @ clean[2][rows]
        start += size
    lhs, dout = lhs.at[total:].set(jnp.nan), dout.at[total:].set(jnp.nan)
    sizes_G = jnp.asarray(sizes, jnp.int32)
    value, vjp = jax.vjp(
        lambda lhs, rhs: grouped_gemm(lhs, rhs, sizes_G, implementation="mosaic"), lhs, rhs
    )
    got = (value, *vjp(dout))
    pairs = zip(("out", "dlhs", "drhs"), got, (out, dlhs, drhs), strict=True)
    errors = {name: helpers.relative_error(a, b) for name, a, b in pairs}
    return errors | {"tail": float(np.abs(np.asarray(got[0][total:], np.float64)).sum())}


def grouped_in_float32() -> dict[str, Any]:
    """Sums that leave the kernels unrounded, CTAs paired the other way; an empty group's gradient
    stays what it was.
    """
    rng = np.random.default_rng(1)
    sizes = GROUPS["uneven"]
    width = 256  # of whole tiles: `add_smem_to_gmem` below does not clip
    shapes = (ROWS, width), (len(sizes), width, width), (ROWS, width)
    lhs, rhs, dout = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)
    before = rng.standard_normal(rhs.shape).astype(np.float32)
    sizes_G = jnp.asarray(sizes, jnp.int32)
    rows, columns = (Tiling(panel=4, pair=pair) for pair in ("rows", "columns"))
    out = grouped_mosaic.product(lhs, rhs, sizes_G, dtype=jnp.float32, tiling=rows)
    drhs = grouped_mosaic.weight_gradient(lhs, dout, sizes_G, dtype=jnp.float32, tiling=columns)
    total = grouped_gemm_weight_gradient(
        lhs, dout, sizes_G, accumulate_GKN=jnp.asarray(before), implementation="mosaic"
    )
    wide = [np.asarray(x, np.float64) for x in (lhs, rhs, dout)]
    expected, gradient = np.zeros((ROWS, width)), np.zeros(rhs.shape)
    for g, end in enumerate(np.cumsum(sizes)):
        part = slice(end - sizes[g], end)
        expected[part] = wide[0][part] @ wide[1][g]
        gradient[g] = wide[0][part].T @ wide[2][part]
    empty = sizes.index(0)
    return {
        "out": helpers.relative_error(out, expected),
        "drhs": helpers.relative_error(drhs, gradient),
        "total": helpers.relative_error(total, before + gradient),
        "empty": helpers.same_bits(total[empty], before[empty]),
    }


def scatter(case: str) -> dict[str, Any]:
    """Whether the sums are those of `scatter_order.sum_by_id`, bit for bit."""
    rows, width, destinations = (150, 640, 31) if case == "uniform" else (2300, 128, 7)
    rng = np.random.default_rng(2)
    ids = rng.integers(0, destinations, rows)
    if case == "half on one":
        ids[rng.permutation(rows)[: rows // 2]] = 3
    if case == "all on the last":
        ids[:] = destinations - 1
    if case == "uniform":
        ids[::5], ids[::7] = -1, destinations
    values = jnp.asarray(helpers.values_of_many_magnitudes(rng, rows, width), jnp.bfloat16)
    ids_R = jnp.asarray(ids, jnp.int32)
    out = scatter_add(values, ids_R, destinations, implementation="mosaic")
    expected = scatter_order.sum_by_id(np.asarray(values, np.float32), ids, destinations)
    exact = np.zeros((destinations, width))
    kept = (ids >= 0) & (ids < destinations)
    np.add.at(exact, ids[kept], np.asarray(values, np.float64)[kept])
    return {
        "same bits": helpers.same_bits(out, expected),
        "out": helpers.relative_error(out, exact),
    }


def dispatch() -> dict[str, Any]:
    """Value and gradient; some rows have no token."""
    rng = np.random.default_rng(4)
    tokens, selected, rows, width = 19, 3, 70, 384
    slots = rng.permutation(rows)[: tokens * selected].reshape(tokens, selected)
    slots[0, 1], slots[5] = rows, -1
    token_of_row = np.full(rows, tokens)
    for (t, _), slot in np.ndenumerate(slots):
        if 0 <= slot < rows:
            token_of_row[slot] = t
    token_of_row[slots[7, 0]] = -1
    draw = helpers.values_of_many_magnitudes
    x = jnp.asarray(draw(rng, tokens, width), jnp.bfloat16)
    drows = jnp.asarray(draw(rng, rows, width), jnp.bfloat16)
    slots_TK, token_of_row_R = jnp.asarray(slots, jnp.int32), jnp.asarray(token_of_row, jnp.int32)

    def run(implementation: str) -> tuple[jax.Array, jax.Array]:
        def gather(x: jax.Array) -> jax.Array:
            return gather_rows(x, token_of_row_R, slots_TK, implementation=implementation)

        routed, vjp = jax.vjp(gather, x)
        return routed, *vjp(drows)

    pairs = zip(("rows", "dx"), run("mosaic"), run("reference"), strict=True)
    return {name: helpers.same_bits(a, b) for name, a, b in pairs}


class Decode(NamedTuple):
    """One call of mla_decode; what lies past a row's length holds NaN."""

    tokens: int
    heads: int
    latent: int
    rope: int
    entries: int
    lengths: tuple[int, ...]
    dtype: str = "bfloat16"
    page: int = 0  # entries of a page of a paged cache


DECODES = {
    "few heads, paged": Decode(2, 4, 128, 64, 384, (250, 1, 0), page=128),
    "two row tiles": Decode(2, 48, 192, 64, 192, (129,)),
    "three tokens": Decode(3, 16, 64, 128, 192, (129, 2, 70), "float16"),
    "64 heads": Decode(1, 64, 320, 64, 128, (100, 128)),
    "many splits": Decode(2, 4, 64, 64, 2560, (2560, 1)),
}


def decode(case: Decode) -> dict[str, Any]:
    """Errors of the kernel, over splits of two tiles, and of the reference; what the first tokens
    that stand before the cache get.
    """
    rng = np.random.default_rng(3)
    decode_mosaic.MIN_SPLIT = decode_mosaic.MAX_SPLIT = 2 * decode_mosaic.TILE
    batch, width = len(case.lengths), case.latent + case.rope
    q, clean = (
        jnp.asarray(rng.standard_normal(shape), case.dtype)
        for shape in ((batch, case.tokens, case.heads, width), (batch, case.entries, width))
    )
    lengths_B = jnp.asarray(case.lengths, jnp.int32)
    past = np.arange(case.entries)[None] >= np.asarray(case.lengths)[:, None]
    cache = jnp.where(past[..., None], jnp.nan, clean)

    def run(
        q: jax.Array, cache: jax.Array, implementation: str, tables: jax.Array | None = None
    ) -> np.ndarray:
        options = dict(scale=0.2, value_dim=case.latent, implementation=implementation)
        attend = functools.partial(mla_decode, **options)
        attend = attend if implementation == "mosaic" else jax.jit(attend)
        return np.asarray(attend(q, cache, lengths_B, block_tables_BP=tables), np.float64)

    paged = helpers.paged(rng, cache, case.lengths, case.page) if case.page else (cache, None)
    got, reference = run(q, paged[0], "mosaic", paged[1]), run(q, cache, "reference")
    with jax.enable_x64(True):
        exact = run(q.astype(jnp.float64), clean.astype(jnp.float64), "reference")
    position = np.asarray(case.lengths)[:, None] - case.tokens + np.arange(case.tokens)
    return {
        "out": helpers.relative_error(got, exact),
        "reference": helpers.relative_error(reference, exact),
        "before": float(np.abs(got[position < 0]).sum()),
    }


def race() -> dict[str, Any]:
    """Two kernels, of which the first has a race: two warpgroups write one number."""

    def run(writers: int) -> jax.Array:
        def body(out: Any, shared: Any) -> None:
            warpgroup = lax.axis_index("warpgroup")

            @pl.when(warpgroup < writers)
            def _() -> None:
                shared[...] = jnp.ones(shared.shape, shared.dtype)

            @pl.when(warpgroup == 0)
            def _() -> None:
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(shared, out)
                plgpu.wait_smem_to_gmem(0)

        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
            scratch_types=(plgpu.SMEM((128,), jnp.float32),),
            num_threads=2,
            thread_name="warpgroup",
        )()

    return {"out": float((run(2) + run(1)).sum())}


SCATTERS = ("uniform", "half on one", "all on the last")
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"grouped {name}": lambda sizes=sizes: grouped(sizes) for name, sizes in GROUPS.items()},
    "grouped float32": grouped_in_float32,
    "dispatch": dispatch,
    "race": race,
    **{f"scatter {name}": lambda name=name: scatter(name) for name in SCATTERS},
    **{f"decode {name}": lambda case=case: decode(case) for name, case in DECODES.items()},
    **{f"attention {name}": lambda case=case: attention(case) for name, case in ATTENTIONS.items()},
    **{
        f"swiglu {name}": lambda case=case: interpreted_swiglu.swiglu(case, "mosaic")
        for name, case in interpreted_swiglu.CASES.items()
    },
    **{
        f"norm {name}": lambda case=case: interpreted_norm.norm(case, "mosaic")
        for name, case in interpreted_norm.CASES.items()
    },
    **{
        f"skinny {name}": lambda case=case: interpreted_skinny.skinny(case, "mosaic")
        for name, case in interpreted_skinny.CASES.items()
    },
    **{
        f"ffn {name}": lambda case=case: interpreted_ffn.ffn(case, "mosaic")
        for name, case in interpreted_ffn.CASES.items()
    },
    "ffn left out": lambda: interpreted_ffn.left_out("mosaic"),
    **{
        f"fp8 {name}": lambda case=case: interpreted_fp8.fp8(case, "mosaic")
        for name, case in interpreted_fp8.CASES.items()
    },
    "add_norm": lambda: interpreted_add_norm.add_norm("mosaic"),
    **{
        f"heads {name}": lambda case=case: interpreted_heads.heads(case, "mosaic")
        for name, case in interpreted_heads.CASES.items()
    },
}
RACES = {
    "grouped uneven",
    "grouped float32",
    "scatter uniform",
    "scatter all on the last",
    "dispatch",
    "decode two row tiles",
    "attention packed",
    "swiglu cut",
    "norm a row left",
    "skinny long",
    "ffn long",
    "fp8 uneven",
    "add_norm",
    "heads some tokens",
    "race",
}


def multiply_add(sums: jax.Array, a: Any, b: Any) -> jax.Array:
    """What the interpreter lacks: a product whose sums and left operand are in registers."""
    a = a if isinstance(a, jax.Array) else a[...]
    return sums + jnp.dot(a, b[...], preferred_element_type=jnp.float32)


def add_smem_to_gmem(part: Any, out: Any) -> None:
    """What the interpreter lacks: an addition in device memory."""
    out[...] = out[...] + part[...]


class Races(gpu_callbacks.GPURaceDetectionState):
    """The interpreter makes one for every launch and keeps the last; `launches` has all of them."""

    launches: list["Races"] = []

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.launches.append(self)


def main(names: list[str]) -> None:
    """Runs the named cases, or all."""
    _mosaic.num_sms = lambda: NUM_SMS
    _mosaic.multiply_add = multiply_add
    _mosaic.add_smem_to_gmem = add_smem_to_gmem
    register_wgmma.install()
    gpu_callbacks.GPURaceDetectionState = Races
    for name in names or CASES:
        start = time.perf_counter()
        Races.launches.clear()
        params = plgpu.InterpretGPUParams(detect_races=name in RACES)
        with plgpu.force_gpu_interpret_mode(params):
            result = CASES[name]()
        if name in RACES:
            result["launches"] = len(Races.launches)
            result["races"] = any(launch.races_found for launch in Races.launches)
        result |= {"case": name, "seconds": round(time.perf_counter() - start, 1)}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
