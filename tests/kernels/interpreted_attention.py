"""Cases of flash_mla for tests/kernels/interpreted.py."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash_mla
from pallas_kernels.flash_mla import schedule
from tests.kernels import helpers

SCALE = 0.09
NAMES = ("out", "dq", "dk", "dv", "drope")


class Attention(NamedTuple):
    """One call: `tokens` queries from place `offset` on among `keys` keys; no shared key part if
    `rope` is 0.
    """

    tokens: int
    keys: int
    heads: int = 1
    widths: tuple[int, int, int] = (128, 64, 128)  # nope, rope, value
    offset: int | None = None
    segments: str = ""
    dtype: str = "bfloat16"


ATTENTIONS = {
    # Tiles that the mask cuts, that are whole, and that no query sees; diagonals of one segment.
    "packed": Attention(140, 140, segments="packed"),
    "one segment at the end": Attention(200, 200, widths=(64, 0, 64), segments="long end"),
    "offset": Attention(70, 333, widths=(64, 64, 128), offset=130, segments="packed"),
    "plain": Attention(300, 300, heads=2, dtype="float16"),
    "any ids": Attention(150, 150, widths=(64, 0, 64), segments="any"),
    "short": Attention(17, 17, heads=3, widths=(64, 64, 192)),
    "wide": Attention(130, 140, widths=(192, 64, 128), offset=3),
}


def segment_ids(kind: str, keys: int) -> jax.Array | None:
    """Documents of several lengths, one token among them, and a last one of a token or long; or ids
    in no order.
    """
    if not kind:
        return None
    rng = np.random.default_rng(6)
    ids = rng.integers(0, 3, keys)
    if kind != "any":
        starts = (0, 3, 4, 67, 70) + ((keys - 1,) if kind == "packed" else ())
        ids = np.searchsorted(starts, np.arange(keys), side="right")
    return jnp.asarray(ids, jnp.int32)[None]


def attention(case: Attention) -> dict[str, Any]:
    """Errors of value and gradients, and those of the reference in the same dtype; whether the
    gradients of one head at a time are the same.
    """
    rng = np.random.default_rng(5)
    nope, rope, value = case.widths

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((1, *shape)), case.dtype)

    q = draw(case.tokens, case.heads, nope + rope)
    k, v = draw(case.keys, case.heads, nope), draw(case.keys, case.heads, value)
    shared = (draw(case.keys, rope),) if rope else ()
    dout = draw(case.tokens, case.heads, value)
    ids = segment_ids(case.segments, case.keys)

    def run(implementation: str, dtype: Any = case.dtype) -> tuple[jax.Array, ...]:
        def attend(q: jax.Array, k: jax.Array, v: jax.Array, *shared: jax.Array) -> jax.Array:
            return flash_mla(
                q,
                k,
                v,
                scale=SCALE,
                segment_ids=ids,
                k_rope=shared[0] if shared else None,
                q_offset=case.offset,
                implementation=implementation,
            )

        def both(dout: jax.Array, *operands: jax.Array) -> tuple[jax.Array, ...]:
            out, vjp = jax.vjp(attend, *operands)
            return out, *vjp(dout)

        # The interpreter's launches stay programs of their own.
        both = both if implementation == "mosaic" else jax.jit(both)
        return both(*(x.astype(dtype) for x in (dout, q, k, v, *shared)))

    got, reference = run("mosaic"), run("reference")
    result = {}
    if case.heads > 1:
        schedule.SCRATCH_BYTES = 1
        result["one head at a time"] = helpers.same_bits(got, run("mosaic"))
    with jax.enable_x64(True):
        exact = run("reference", jnp.float64)
    for name, a, b, c in zip(NAMES, got, reference, exact, strict=False):
        result[name] = helpers.relative_error(a, c)
        result[f"{name}, reference"] = helpers.relative_error(b, c)
    return result
