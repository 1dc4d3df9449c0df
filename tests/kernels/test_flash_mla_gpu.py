"""flash_mla's kernels on a Hopper GPU: pytest -m gpu tests/kernels/test_flash_mla_gpu.py"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_mla
from tests.kernels import helpers

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
NAMES = ("out", "dq", "dk", "dv", "drope")


@pytest.fixture(scope="module", autouse=True)
def _hopper():
    helpers.require_hopper()


RELEASED = (128, 64, 128)  # widths of keys, rope and values


def draw(tokens, keys, heads, batch=1, widths=RELEASED, dtype="bfloat16"):
    """Operands and the gradient of the output."""
    rng, (nope, rope, value) = np.random.default_rng(tokens), widths
    shapes = (tokens, heads, nope + rope), (keys, heads, nope), (keys, heads, value), (keys, rope)
    *operands, dout = (
        jnp.asarray(rng.standard_normal((batch, *shape)), dtype)
        for shape in (*shapes, (tokens, heads, value))
    )
    return tuple(operands), dout


def segment_ids(kind, keys, batch=1):
    """Documents of several lengths, one token among them; ids in no order; one id; None."""
    rng = np.random.default_rng(7)
    if not kind:
        return None
    if kind == "ones":
        ids = np.ones(keys)
    elif kind == "packed":
        starts = np.sort(np.append(rng.choice(keys, 5, replace=False), [0, 5, 6, keys - 1]))
        ids = np.searchsorted(starts, np.arange(keys), side="right")
    else:
        ids = rng.integers(0, 3, keys)
    return jnp.tile(jnp.asarray(ids, jnp.int32), (batch, 1))


@functools.partial(jax.jit, static_argnums=0)
def run(implementation, operands, dout, ids=None, offset=None):
    """Value and gradients in the dtype of the operands."""

    def attend(q, k, v, rope):
        return flash_mla(
            q,
            k,
            v,
            scale=q.shape[3] ** -0.5,
            segment_ids=ids,
            k_rope=rope if rope.shape[2] else None,
            q_offset=offset,
            implementation=implementation,
        )

    out, vjp = jax.vjp(attend, *operands)
    return out, *vjp(dout)


@pytest.mark.parametrize(
    "batch, tokens, keys, kind, offset",
    [
        (2, 4096, 4096, "", None),
        (2, 4096, 4096, "ones", None),
        (2, 4096, 4096, "packed", None),
        (1, 777, 777, "packed", None),
        (1, 300, 1111, "packed", 517),
        (1, 640, 640, "any", None),
        (3, 17, 17, "", None),
    ],
)
def test_is_as_good_as_the_reference(batch, tokens, keys, kind, offset):
    assert_as_good(draw(tokens, keys, 2, batch), segment_ids(kind, keys, batch), offset)


# Keys, values or neither in registers; stages as many as fit; results in several rounds.
@pytest.mark.parametrize(
    "widths, dtype",
    [
        ((192, 64, 128), "bfloat16"),
        ((64, 64, 192), "bfloat16"),
        ((192, 0, 192), "bfloat16"),
        ((64, 0, 256), "float16"),
    ],
)
def test_other_widths(widths, dtype):
    operands = draw(700, 700, 2, widths=widths, dtype=dtype)
    assert_as_good(operands, segment_ids("packed", 700), None)
    first = run("mosaic", *operands)
    assert all(helpers.same_bits(first, run("mosaic", *operands)) for _ in range(10))


def assert_as_good(operands_and_dout, ids, offset):
    operands, dout = operands_and_dout
    got = run("mosaic", operands, dout, ids, offset)
    reference = run("reference", operands, dout, ids, offset)
    with jax.default_matmul_precision("highest"):
        wide = tuple(x.astype(jnp.float32) for x in operands)
        exact = run("reference", wide, dout.astype(jnp.float32), ids, offset)
    for name, a, b, c in zip(NAMES, got, reference, exact, strict=True):
        error, allowed = helpers.relative_error(a, c), helpers.relative_error(b, c)
        assert error <= max(1.3 * allowed, 3.2e-3), name


@pytest.mark.parametrize("kind", ["", "ones", "packed"])
@pytest.mark.parametrize("batch, tokens, runs", [(2, 4096, 20), (1, 8192, 100)])
def test_all_runs_give_the_same_bits(batch, tokens, runs, kind):
    operands, dout = draw(tokens, tokens, 16, batch)
    ids = segment_ids(kind, tokens, batch)
    first = run("mosaic", operands, dout, ids)
    assert all(bool(jnp.all(jnp.isfinite(x.astype(jnp.float32)))) for x in first)
    noise = jnp.ones((4096, 4096), jnp.bfloat16)
    other = jax.jit(lambda x: x @ x.T)
    for i in range(runs):
        if i % 3 == 0:
            other(noise)
        again = run("mosaic", operands, dout, ids)
        same = (jnp.array_equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(map(bool, same))
