import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_gemm, grouped_gemm_weight_gradient
from tests.kernels import helpers

ROWS, CONTRACT, WIDTH = 200, 24, 40
SIZES = {
    "even": [50, 60, 40, 50],
    "empty": [0, 130, 0, 70],
    "one row": [1, 0, 198, 1],
    "one group": [0, 0, 200, 0],
    "single": [200],
    "sum below rows": [3, 64, 0, 65],
    "no rows": [0, 0, 0],
}
TOLERANCE = {"bfloat16": 4e-3, "float32": 1e-6, "float64": 1e-14}


def operands(sizes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    lhs = helpers.values_of_many_magnitudes(rng, ROWS, CONTRACT)
    rhs = helpers.values_of_many_magnitudes(rng, len(sizes), CONTRACT, WIDTH)
    dout = helpers.values_of_many_magnitudes(rng, ROWS, WIDTH)
    return tuple(jnp.asarray(x, dtype) for x in (lhs, rhs, dout))


def naive(lhs, rhs, dout, sizes):
    """Value and both gradients, float64."""
    lhs, rhs, dout = (np.asarray(x, np.float64) for x in (lhs, rhs, dout))
    out = np.zeros((ROWS, WIDTH))
    dlhs, drhs = np.zeros_like(lhs), np.zeros_like(rhs)
    start = 0
    for g, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = lhs[rows] @ rhs[g]
        dlhs[rows] = dout[rows] @ rhs[g].T
        drhs[g] = lhs[rows].T @ dout[rows]
        start += size
    return out, dlhs, drhs


@jax.jit
def value_and_gradients(lhs, rhs, sizes, dout):
    out, vjp = jax.vjp(lambda lhs, rhs: grouped_gemm(lhs, rhs, sizes), lhs, rhs)
    return out, *vjp(dout)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_naive(name, dtype):
    sizes = SIZES[name]
    with helpers.strict_types():
        lhs, rhs, dout = operands(sizes, dtype)
        actual = value_and_gradients(lhs, rhs, jnp.asarray(sizes, jnp.int32), dout)
        for got, want in zip(actual, naive(lhs, rhs, dout, sizes), strict=True):
            assert got.dtype == dtype
            assert helpers.relative_error(got, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype, sums", [("bfloat16", "float32"), ("float64", "float64")])
def test_result_in_the_dtype_of_the_sums(dtype, sums):
    sizes = SIZES["sum below rows"]
    with helpers.strict_types():
        lhs, rhs, dout = operands(sizes, dtype)
        group_sizes = jnp.asarray(sizes, jnp.int32)
        out, vjp = jax.vjp(
            lambda lhs, rhs: grouped_gemm(lhs, rhs, group_sizes, out_dtype=sums), lhs, rhs
        )
        expected = naive(lhs, rhs, dout, sizes)
        assert out.dtype == sums
        assert helpers.relative_error(out, expected[0]) <= TOLERANCE[sums]
        for got, want in zip(vjp(dout.astype(sums)), expected[1:], strict=True):
            assert got.dtype == dtype
            assert helpers.relative_error(got, want) <= TOLERANCE[dtype]


@jax.jit
def weight_gradients(lhs, dout, sizes, before):
    """In the dtype of the operands, in that of the sums, and added."""
    run = functools.partial(grouped_gemm_weight_gradient, lhs, dout, sizes)
    return run(), run(out_dtype=before.dtype), run(accumulate_GKN=before)


@pytest.mark.parametrize("name", ["even", "one row", "sum below rows", "no rows"])
@pytest.mark.parametrize("dtype, sums", [("bfloat16", "float32"), ("float64", "float64")])
def test_weight_gradient_is_added(name, dtype, sums):
    sizes = SIZES[name]
    with helpers.strict_types():
        lhs, rhs, dout = operands(sizes, dtype)
        used = sum(sizes)
        gradient = naive(lhs, rhs, dout, sizes)[2]
        lhs, dout = lhs.at[used:].set(jnp.nan), dout.at[used:].set(jnp.nan)
        before = np.random.default_rng(7).standard_normal(rhs.shape)
        before = jnp.asarray(before, sums)
        actual = weight_gradients(lhs, dout, jnp.asarray(sizes, jnp.int32), before)
        expected = gradient, gradient, np.asarray(before) + gradient
        for got, want, kind in zip(actual, expected, (dtype, sums, sums), strict=True):
            assert got.dtype == kind
            assert helpers.relative_error(got, want) <= TOLERANCE[kind]


def test_rows_past_the_sum_may_hold_nan():
    sizes = SIZES["sum below rows"]
    lhs, rhs, dout = operands(sizes, "float32")
    used = sum(sizes)
    lhs, dout = lhs.at[used:].set(jnp.nan), dout.at[used:].set(jnp.nan)
    out, dlhs, drhs = value_and_gradients(lhs, rhs, jnp.asarray(sizes), dout)
    assert not np.any(out[used:]) and not np.any(dlhs[used:])
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(dlhs)) and np.all(np.isfinite(drhs))
    assert not np.any(drhs[2]) and np.any(drhs[0])


def test_two_runs_give_the_same_bits():
    sizes = jnp.asarray(SIZES["even"])
    lhs, rhs, dout = operands(SIZES["even"], "float32")
    first = value_and_gradients(lhs, rhs, sizes, dout)
    assert helpers.same_bits(first, value_and_gradients(lhs, rhs, sizes, dout))


def test_no_float_scatter():
    lhs, rhs, dout = operands(SIZES["even"], "float32")
    sizes = jnp.asarray(SIZES["even"])
    assert not helpers.float_scatters(value_and_gradients, lhs, rhs, sizes, dout)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lhs=jnp.zeros((5, 7))), "7 wide"),
        (dict(lhs=jnp.zeros(5)), "expected 2 dimensions"),
        (dict(rhs=jnp.zeros((2, 3, 4), jnp.bfloat16)), "dtypes differ"),
        (dict(sizes=jnp.zeros(2)), "expected an integer dtype"),
        (dict(sizes=jnp.zeros(3, jnp.int32)), "2 groups, group_sizes_G 3"),
        (dict(out_dtype="bfloat16"), "out_dtype=bfloat16 does not fit float32 operands"),
        (dict(out_dtype="f23"), "out_dtype=f23 does not fit float32 operands, choose float32$"),
        (dict(implementation="cuda"), "choose None or one of 'reference'"),
    ],
)
def test_refuses(change, message):
    args = dict(lhs=jnp.zeros((5, 3)), rhs=jnp.zeros((2, 3, 4)), sizes=jnp.zeros(2, jnp.int32))
    args |= change
    with pytest.raises(ValueError, match=message):
        grouped_gemm(args.pop("lhs"), args.pop("rhs"), args.pop("sizes"), **args)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dout=jnp.zeros((6, 4))), "lhs_RK has 5 rows, dout_RN 6"),
        (dict(dout=jnp.zeros((5, 4), jnp.bfloat16)), "dtypes differ"),
        (dict(sizes=jnp.zeros(0, jnp.int32)), "group_sizes_G is empty"),
        (dict(accumulate_GKN=jnp.zeros((2, 4, 3))), r"float32\[2, 4, 3\], expected float32\[2, 3"),
        (dict(accumulate_GKN=jnp.zeros((2, 3, 4), jnp.bfloat16)), "is bfloat16.*expected float32"),
        (
            dict(accumulate_GKN=jnp.zeros((2, 3, 4)), out_dtype="bfloat16"),
            "out_dtype=bfloat16 with accumulate_GKN",
        ),
        (dict(implementation="mosaic"), "multiples of 64, got float32, 3 and 4"),
    ],
)
def test_weight_gradient_refuses(change, message):
    args = dict(lhs=jnp.zeros((5, 3)), dout=jnp.zeros((5, 4)), sizes=jnp.zeros(2, jnp.int32))
    args |= change
    with pytest.raises(ValueError, match=message):
        grouped_gemm_weight_gradient(args.pop("lhs"), args.pop("dout"), args.pop("sizes"), **args)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("contract, width", [(192, 576), (64, 128), (256, 512)])
def test_weight_gradient_is_added_on_hopper(contract, width):
    """In L2, where tiles stick out of the matrix too: the interpreter shows neither."""
    helpers.require_hopper()
    rows, sizes = 1300, jnp.asarray([700, 0, 1, 300], jnp.int32)
    rng = np.random.default_rng(3)
    draw = helpers.values_of_many_magnitudes
    lhs, dout = (jnp.asarray(draw(rng, rows, w), jnp.bfloat16) for w in (contract, width))
    lhs, dout = (x.at[1001:].set(jnp.nan) for x in (lhs, dout))
    before = jnp.asarray(draw(rng, 4, contract, width), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation):
        return grouped_gemm_weight_gradient(
            lhs, dout, sizes, accumulate_GKN=before, implementation=implementation
        )

    total = run("mosaic")
    assert helpers.relative_error(total, run("reference")) <= TOLERANCE["float32"]
    assert helpers.same_bits(total, run("mosaic"))
    assert helpers.same_bits(total[1], before[1])
