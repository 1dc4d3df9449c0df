"""The Hopper kernels where there is no GPU: interpreted, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import gather_rows, grouped_gemm, grouped_gemm_weight_gradient, scatter_add
from pallas_kernels.gather_combine import shapes as gather_shapes
from pallas_kernels.grouped_gemm import shapes as grouped_shapes
from pallas_kernels.scatter_add import shapes as scatter_shapes
from tests.kernels.helpers import interpret

BF16_ROUNDING = 3e-3
MINI = (grouped_shapes.Shape(65536, 2048, 2048, 32), grouped_shapes.Shape(65536, 1024, 2048, 32))


QUICK = ("uneven",)
SLOW = ("unaligned", "no rows", "whole steps")


@pytest.fixture(scope="session")
def interpreted():
    """The quick cases; one program for all, since starting it costs as much as a case."""
    grouped = [f"grouped {name}" for name in QUICK]
    return interpret(*grouped, "grouped float32", "scatter uniform", "dispatch", "race")


def assert_rounded_once(result):
    assert max(result["out"], result["dlhs"], result["drhs"]) <= BF16_ROUNDING
    assert result["tail"] == 0


@pytest.mark.parametrize("groups", QUICK)
def test_grouped_gemm_equals_naive(interpreted, groups):
    assert_rounded_once(interpreted[f"grouped {groups}"])


@pytest.mark.slow
def test_grouped_gemm_equals_naive_in_more_cases():
    results = interpret(*(f"grouped {name}" for name in SLOW))
    assert len(results) == len(SLOW)
    for result in results.values():
        assert_rounded_once(result)


def test_grouped_gemm_sums_in_float32(interpreted):
    result = interpreted["grouped float32"]
    assert max(result["out"], result["drhs"], result["total"]) <= 1e-6
    assert result["empty"]


def test_no_races_in_any_launch(interpreted):
    searched = {name: result for name, result in interpreted.items() if "races" in result}
    # "race" has one to be found, not in its last launch.
    assert {name: result["launches"] for name, result in searched.items()} == {
        "grouped uneven": 3,
        "grouped float32": 3,
        "scatter uniform": 2,
        "dispatch": 1,
        "race": 2,
    }
    assert [name for name, result in searched.items() if result["races"]] == ["race"]


def test_dispatch_equals_reference(interpreted):
    result = interpreted["dispatch"]
    assert result["rows"] and result["dx"]


def assert_in_order(result):
    assert result["same bits"]
    assert result["out"] <= 1e-6


def test_scatter_add_adds_in_its_order(interpreted):
    assert_in_order(interpreted["scatter uniform"])


@pytest.mark.slow
def test_scatter_add_adds_in_its_order_when_one_id_owns_half_or_all():
    half, last = interpret("scatter half on one", "scatter all on the last").values()
    assert_in_order(half)
    assert_in_order(last)
    assert last["launches"] == 3  # a third kernel from 2048 rows on
    assert not last["races"]


SHAPES = grouped_shapes.PRODUCTION + MINI


@pytest.mark.parametrize(
    "shape", [SHAPES[0], *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES[1:])]
)
def test_grouped_gemm_lowers_for_cuda(shape):
    def gradients(lhs, rhs, sizes, dout):
        out, vjp = jax.vjp(
            lambda lhs, rhs: grouped_gemm(lhs, rhs, sizes, implementation="mosaic"), lhs, rhs
        )
        return out, *vjp(dout)

    def spec(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16)

    rows, contract, width, groups = shape
    args = spec(rows, contract), spec(groups, contract, width)
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    traced = jax.jit(gradients).trace(*args, sizes, spec(rows, width))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3


def test_weight_gradient_is_added_in_place():
    """The kernel's output is its input, and so the caller's."""
    rows, contract, width, groups = 640, 128, 256, 3
    sums = jax.ShapeDtypeStruct((groups, contract, width), jnp.float32)
    lhs, dout = (jax.ShapeDtypeStruct((rows, w), jnp.bfloat16) for w in (contract, width))
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)

    def run(sums, lhs, dout, sizes):
        return grouped_gemm_weight_gradient(
            lhs, dout, sizes, accumulate_GKN=sums, implementation="mosaic"
        )

    traced = jax.jit(run, donate_argnums=0).trace(sums, lhs, dout, sizes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "mosaic_gpu" in line]
    assert "output_operand_alias" in call
    assert "tf.aliasing_output = 0" in text


@pytest.mark.parametrize(
    "dtype, contract, width", [("float32", 64, 64), ("bfloat16", 96, 64), ("bfloat16", 64, 72)]
)
def test_grouped_gemm_never_falls_back(dtype, contract, width):
    lhs, rhs = jnp.zeros((8, contract), dtype), jnp.zeros((2, contract, width), dtype)
    with pytest.raises(ValueError, match=f"multiples of 64, got {dtype}, {contract} and {width}"):
        grouped_gemm(lhs, rhs, jnp.zeros(2, jnp.int32), implementation="mosaic")


@pytest.mark.parametrize("shape", scatter_shapes.PRODUCTION)
def test_scatter_add_lowers_for_cuda(shape):
    values = jax.ShapeDtypeStruct((shape.rows, shape.width), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((shape.rows,), jnp.int32)

    def run(values, ids):
        return scatter_add(values, ids, shape.destinations, implementation="mosaic")

    text = jax.jit(run).trace(values, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3


@pytest.mark.parametrize("dtype, width", [("float32", 96), ("bfloat16", 64), ("float16", 0)])
def test_scatter_add_never_falls_back(dtype, width):
    with pytest.raises(ValueError, match=f"multiples of 128, got {dtype} and {width}"):
        scatter_add(jnp.zeros((8, width), dtype), jnp.zeros(8, int), 3, implementation="mosaic")


# 6 lines of 128 columns, too: that is no multiple of what a warpgroup stores together.
@pytest.mark.parametrize("shape", (gather_shapes.PRODUCTION[0], gather_shapes.Shape(501, 3, 768)))
def test_dispatch_lowers_for_cuda(shape):
    x = jax.ShapeDtypeStruct((shape.tokens, shape.width), jnp.bfloat16)
    slots = jax.ShapeDtypeStruct((shape.tokens, shape.selected), jnp.int32)
    token_of_row = jax.ShapeDtypeStruct((shape.tokens * shape.selected,), jnp.int32)
    run = functools.partial(gather_rows, implementation="mosaic")
    traced = jax.jit(run).trace(x, token_of_row, slots)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_dispatch_never_falls_back():
    x, slots = jnp.zeros((4, 96), jnp.bfloat16), jnp.zeros((4, 2), int)
    with pytest.raises(ValueError, match="multiples of 128 up to 16384, got bfloat16 and 96"):
        gather_rows(x, jnp.zeros(8, int), slots, implementation="mosaic")


def test_lowers_inside_shard_map():
    """With types checked: unchecked, gradients through psum are wrong."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])

    def gradients(rhs, lhs, sizes):
        def loss(rhs, lhs):
            out = grouped_gemm(lhs, rhs, sizes, implementation="mosaic")
            ids = sizes[jnp.arange(out.shape[0]) % sizes.shape[0]]
            return jnp.sum(scatter_add(out, ids, 5, implementation="mosaic"))

        rows = gather_rows(lhs, sizes, sizes[:, None], implementation="mosaic")
        drhs = jax.grad(loss)(rhs, lhs)
        dout = jnp.zeros((lhs.shape[0], rhs.shape[2]), lhs.dtype)
        sums = drhs.astype(jnp.float32)
        drhs = grouped_gemm_weight_gradient(
            lhs, dout, sizes, accumulate_GKN=sums, implementation="mosaic"
        )
        return jax.lax.psum(drhs, "data"), rows

    split = jax.shard_map(
        gradients, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=(P(), P("data"))
    )
    rhs = jax.ShapeDtypeStruct((256, 128, 192 * 2), jnp.bfloat16)
    lhs = jax.ShapeDtypeStruct((512, 128), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((512,), jnp.int32)
    lowered = jax.jit(split).trace(rhs, lhs, sizes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 5
