"""grouped_gemm_fp8: both implementations against float64; the Hopper kernel interpreted, lowered,
and on a GPU with `pytest -m gpu tests/kernels/test_grouped_gemm_fp8.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import HOPPER, grouped_gemm_fp8, made_for, quantize_rows, quantize_weights
from pallas_kernels.grouped_gemm import shapes
from pallas_kernels.grouped_gemm_fp8 import BLOCK, FP8
from pallas_kernels.grouped_gemm_fp8.quantize import dequantize_rows, dequantize_weights
from tests.kernels import helpers, interpreted_fp8
from tests.kernels.interpreted_fp8 import Case

ROUNDING = {"bfloat16": 3e-3, "float32": 1e-6}
TENSOR_CORE_ROUNDING = ROUNDING | {"float32": 1e-3}
SIZES = {
    "even": (50, 60, 40, 50),
    "empty": (0, 130, 0, 70),
    "one row": (1, 0, 198, 1),
    "one group": (0, 0, 200, 0),
    "single": (200,),
    "sum below rows": (3, 64, 0, 65),
    "no rows": (0, 0, 0),
}
TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)


def assert_close(errors, dtype, rounding=ROUNDING):
    assert errors["out"] <= rounding[dtype]
    assert errors["tail"] == 0


# ---- the product


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", SIZES)
def test_equals_float64(name, dtype):
    case = Case(200, 256, 384, SIZES[name], dtype)
    for orders in (case.orders, interpreted_fp8.FEW_ORDERS):
        assert_close(interpreted_fp8.fp8(case._replace(orders=orders), "reference"), dtype)


@pytest.fixture(scope="session")
def interpreted():
    return helpers.interpret(*(f"fp8 {name}" for name in interpreted_fp8.CASES))


@pytest.mark.parametrize("name", interpreted_fp8.CASES)
def test_mosaic_equals_float64(interpreted, name):
    result = helpers.errors_of(interpreted[f"fp8 {name}"])
    assert_close(result, interpreted_fp8.CASES[name].out_dtype)
    assert result.get("pairs", 0) == 0


def test_mosaic_has_no_races(interpreted):
    (searched,) = (result for result in interpreted.values() if "races" in result)
    assert searched["launches"] == 1
    assert not searched["races"]


def test_results_are_bfloat16_unless_said_otherwise():
    arrays = interpreted_fp8.operands(Case(8, 128, 128, (8,)))
    assert grouped_gemm_fp8(*arrays).dtype == jnp.bfloat16
    assert grouped_gemm_fp8(*arrays, out_dtype=None).dtype == jnp.bfloat16


def test_two_runs_give_the_same_bits():
    arrays = interpreted_fp8.operands(Case(200, 256, 384, SIZES["even"]))
    assert helpers.same_bits(grouped_gemm_fp8(*arrays), grouped_gemm_fp8(*arrays))
    assert not helpers.float_scatters(grouped_gemm_fp8, *arrays)


def specs(rows, contract, width, groups):
    blocks = width // BLOCK, contract // BLOCK
    return (
        jax.ShapeDtypeStruct((rows, contract), FP8),
        jax.ShapeDtypeStruct((rows, blocks[1]), jnp.float32),
        jax.ShapeDtypeStruct((groups, width, contract), FP8),
        jax.ShapeDtypeStruct((groups, *blocks), jnp.float32),
        jax.ShapeDtypeStruct((groups,), jnp.int32),
    )


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", shapes.PRODUCTION, ids=str)
def test_lowers_for_cuda(shape, dtype):
    """By itself for Hopper."""
    run = functools.partial(grouped_gemm_fp8, out_dtype=jnp.dtype(dtype))
    with made_for(HOPPER):
        text = jax.jit(run).trace(*specs(*shape)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


def test_lowers_inside_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = jax.shard_map(
        functools.partial(grouped_gemm_fp8, implementation="mosaic"),
        mesh=mesh,
        in_specs=(P("data"), P("data"), P(), P(), P("data")),
        out_specs=P("data"),
    )
    lhs, lhs_scales, rhs, rhs_scales, _ = specs(512, 256, 128, 3)
    sizes = jax.ShapeDtypeStruct((6,), jnp.int32)
    traced = jax.jit(split).trace(lhs, lhs_scales, rhs, rhs_scales, sizes)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(lhs=jnp.zeros(256, FP8)), "expected 2 dimensions"),
        (dict(lhs=jnp.zeros((5, 384), FP8)), "lhs_RK is 384 wide, rhs_GNK contracts 256"),
        (dict(lhs=jnp.zeros((5, 256), jnp.bfloat16)), "lhs_RK is bfloat16.*expected float8_e4m3fn"),
        (dict(lhs_scales=jnp.ones((5, 3))), r"lhs_scales_RA is float32\[5, 3\], expected .*\[5, 2"),
        (dict(lhs_scales=jnp.ones((5, 2), jnp.bfloat16)), "is bfloat16.*expected float32"),
        (dict(rhs=jnp.zeros((2, 128, 256), jnp.float8_e5m2)), "rhs_GNK is float8_e5m2"),
        (dict(rhs=jnp.zeros((2, 192, 256), FP8)), "N=192, expected a positive multiple of 128"),
        (dict(rhs_scales=jnp.ones((2, 2, 1))), r"\[2, 2, 1\], expected float32\[2, 1, 2\]"),
        (dict(sizes=jnp.zeros(2)), "expected an integer dtype"),
        (dict(sizes=jnp.zeros(3, jnp.int32)), "2 groups, group_sizes_G 3"),
        (dict(out_dtype=jnp.float16), "out_dtype=float16, choose bfloat16 or float32$"),
        (dict(out_dtype="bf16"), "^grouped_gemm_fp8: out_dtype=bf16, choose bfloat16 or float32$"),
        (dict(implementation="triton"), "choose None or one of 'reference', 'mosaic'"),
    ],
)
def test_refuses(change, message):
    args = dict(
        lhs=jnp.zeros((5, 256), FP8),
        lhs_scales=jnp.ones((5, 2)),
        rhs=jnp.zeros((2, 128, 256), FP8),
        rhs_scales=jnp.ones((2, 1, 2)),
        sizes=jnp.zeros(2, jnp.int32),
    )
    args |= change
    operands = [args.pop(name) for name in ("lhs", "lhs_scales", "rhs", "rhs_scales", "sizes")]
    with pytest.raises(ValueError, match=message):
        grouped_gemm_fp8(*operands, **args)


def test_has_no_gradient():
    lhs, scales, *rest = interpreted_fp8.operands(Case(8, 128, 128, (8,)))
    with pytest.raises(ValueError, match="grouped_gemm_fp8: has no gradient"):
        jax.grad(lambda scales: grouped_gemm_fp8(lhs, scales, *rest).sum())(scales)


# ---- quantisation


def draw(*shape):
    return jnp.asarray(
        helpers.values_of_many_magnitudes(np.random.default_rng(6), *shape), jnp.float32
    )


KINDS = {
    "rows": (quantize_rows, dequantize_rows, (6, 3 * BLOCK)),
    "weights": (quantize_weights, dequantize_weights, (2, 3 * BLOCK, 2 * BLOCK)),
}


def blocks_of(kind, x):
    """[blocks, numbers of a block] in the order of the scales."""
    if kind == "rows":
        return np.asarray(x).reshape(-1, BLOCK)
    groups, width, contract = x.shape
    blocks = np.asarray(x).reshape(groups, width // BLOCK, BLOCK, contract // BLOCK, BLOCK)
    return blocks.swapaxes(2, 3).reshape(-1, BLOCK * BLOCK)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind):
    """Every number within half a step of its own, or of the smallest step of its block."""
    quantize, dequantize, shape = KINDS[kind]
    x = draw(*shape)
    values, scales = quantize(x)
    assert values.dtype == FP8 and scales.dtype == jnp.float32
    peaks = np.abs(blocks_of(kind, x)).max(axis=1)
    np.testing.assert_allclose(np.asarray(scales).reshape(-1), peaks / 448, rtol=1e-6)
    largest = np.abs(blocks_of(kind, values.astype(jnp.float32))).max(axis=1)
    assert np.all(largest == 448)
    error = np.abs(blocks_of(kind, dequantize(values, scales)) - blocks_of(kind, x))
    bound = np.maximum(np.abs(blocks_of(kind, x)) / 16, peaks[:, None] / 448 * 2.0**-10)
    assert np.all(error <= bound * (1 + 1e-5))


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_again_nothing_changes(kind):
    quantize, dequantize, shape = KINDS[kind]
    values, scales = quantize(draw(*shape))
    again, scales_again = quantize(dequantize(values, scales))
    assert helpers.same_bits(values, again)
    np.testing.assert_allclose(scales, scales_again, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_power_of_two_moves_the_scales_alone(kind, dtype):
    quantize, _, shape = KINDS[kind]
    x = jnp.asarray(np.random.default_rng(7).standard_normal(shape), dtype)
    (values, scales), (moved, moved_scales) = quantize(x), quantize(x * 8)
    assert helpers.same_bits(values, moved)
    assert helpers.same_bits(scales * 8, moved_scales)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "number", [0.0, -0.0, 1e-45, TINY, 448.0, 464.0, -1e5, LARGEST, -LARGEST, np.inf, -np.inf]
)
def test_no_number_makes_nan(kind, number):
    quantize, dequantize, shape = KINDS[kind]
    x = draw(*shape).at[..., 5].set(number)
    for array in (x, jnp.full(shape, number, jnp.float32)):
        values, scales = jax.jit(quantize)(array)
        back = np.asarray(dequantize(values, scales))
        assert np.all(np.isfinite(back)) and np.all(np.asarray(scales) >= TINY)
        expected = np.clip(number, -LARGEST, LARGEST)
        np.testing.assert_allclose(back[..., 5], expected, rtol=2**-4, atol=TINY)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_seen(kind):
    quantize, dequantize, shape = KINDS[kind]
    x = draw(*shape)
    back = dequantize(*quantize(x.at[(0,) * len(shape)].set(jnp.nan)))
    nan = np.isnan(blocks_of(kind, back))
    assert nan[0, 0] and not nan[1:].any()


@pytest.mark.parametrize(
    "quantize, x, message",
    [
        (quantize_rows, jnp.zeros((3, 576 + 64)), None),
        (quantize_rows, jnp.zeros((3, 576)), "quantize_rows: K=576, expected a positive multiple"),
        (quantize_rows, jnp.zeros((3, 0)), "K=0, expected a positive multiple of 128"),
        (quantize_rows, jnp.zeros(128), "expected 2 dimensions"),
        (quantize_rows, jnp.zeros((3, 128), int), "expected a floating dtype"),
        (quantize_weights, jnp.zeros((2, 576, 128)), "quantize_weights: N=576, expected a positi"),
        (quantize_weights, jnp.zeros((2, 128, 64)), "K=64, expected a positive multiple of 128"),
        (quantize_weights, jnp.zeros((128, 128)), "expected 3 dimensions"),
    ],
)
def test_quantize_refuses(quantize, x, message):
    if message is None:
        assert quantize(x)[1].shape == (3, 5)
        return
    with pytest.raises(ValueError, match=message):
        quantize(x)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "case",
    [
        Case(1300, 1024, 640, (700, 0, 1, 300)),
        Case(224, 128, 128, (7, 9, 203, 4, 1), "float32"),
        Case(1300, 2048, 512, (64, 128, 192, 0), "float32"),
        Case(1300, 2048, 512, (64, 128, 192, 0), "float32", interpreted_fp8.FEW_ORDERS),
        Case(200, 256, 256, (0, 0)),
    ],
    ids=str,
)
def test_on_hopper(case):
    """Within a block the tensor cores keep about 14 bits: the interpreter's float32 does not show
    it.
    """
    helpers.require_hopper()
    errors = interpreted_fp8.fp8(case, "mosaic")
    print(errors)
    assert_close(errors, case.out_dtype, TENSOR_CORE_ROUNDING)
    assert errors.get("pairs", 0) == 0
    arrays = interpreted_fp8.operands(case)
    reference = grouped_gemm_fp8(*arrays, out_dtype=jnp.float32, implementation="reference")
    exact = interpreted_fp8.exact(case, arrays)
    error = interpreted_fp8.worst_error(reference, exact, sum(case.sizes))
    assert error <= ROUNDING["float32"]
    run = jax.jit(functools.partial(grouped_gemm_fp8, implementation="mosaic"))
    first = run(*arrays)
    assert all(helpers.same_bits(first, run(*arrays)) for _ in range(20))
