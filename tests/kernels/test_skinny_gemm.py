"""skinny_gemm: both implementations against float64; the Hopper kernel interpreted, lowered, and on
a GPU with `pytest -m gpu tests/kernels/test_skinny_gemm.py`.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import skinny_gemm
from pallas_kernels.skinny_gemm import MAX_ROWS, mosaic, shapes
from tests.kernels import helpers, interpreted_skinny

ROUNDING = {"bfloat16": 3e-3, "float16": 4e-4, "float32": 1e-6, "float64": 1e-14}


def assert_close(errors, dtype, float32=ROUNDING["float32"]):
    assert set(errors) == {"outs", "dx", "dmatrices", "float32", "terms"}
    for name, error in errors.items():
        assert error <= (float32 if name == "float32" else ROUNDING[dtype]), name


@pytest.mark.parametrize("dtype", ROUNDING)
def test_equals_float64(dtype):
    case = interpreted_skinny.Case(5, 40, (30, 7), dtype)
    with helpers.strict_types():
        assert_close(interpreted_skinny.skinny(case, "reference"), dtype)


@pytest.fixture(scope="session")
def interpreted():
    return helpers.interpret(*(f"skinny {name}" for name in interpreted_skinny.CASES))


@pytest.mark.parametrize("name", interpreted_skinny.CASES)
def test_mosaic_equals_float64(interpreted, name):
    result = helpers.errors_of(interpreted[f"skinny {name}"])
    assert_close(result, interpreted_skinny.CASES[name].dtype)


def test_the_kernel_takes_all_rows_that_are_promised():
    assert mosaic.ROWS == MAX_ROWS


def test_a_case_refills_its_stages():
    case = interpreted_skinny.CASES["long"]
    parts = mosaic.splits(case.contracted, sum(case.widths))
    assert case.contracted // mosaic.PIECE // parts > 2 * mosaic.STAGES


def test_mosaic_has_no_races(interpreted):
    # The interpreter's products are finished at once: that a stage is only filled again when its
    # own is, a GPU must show.
    (searched,) = (result for result in interpreted.values() if "races" in result)
    assert searched["launches"] == 3
    assert not searched["races"]


@pytest.mark.parametrize("shape", shapes.PRODUCTION)
def test_splits_give_no_sm_two_ctas_and_cut_evenly(shape):
    parts = mosaic.splits(shape.contracted, sum(shape.widths))
    tiles = sum(shape.widths) // mosaic.PIECE
    assert parts == 1 or parts * tiles <= 132
    assert shape.contracted % (parts * mosaic.PIECE) == 0


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shape", [*interpreted_skinny.CASES.values(), *shapes.PRODUCTION[:4]])
def test_mosaic_equals_float64_on_a_gpu(shape):
    helpers.require_hopper()
    case = interpreted_skinny.Case(*shape)
    first = interpreted_skinny.skinny(case, "mosaic")
    assert_close(first, case.dtype, float32=3e-6)  # sums of thousands on tensor cores
    assert all(interpreted_skinny.skinny(case, "mosaic") == first for _ in range(2))


ODD = shapes.Shape(13, 128, (64, 64))  # rows that are no whole tiles


@pytest.mark.parametrize("shape", [*shapes.PRODUCTION, ODD])
def test_mosaic_lowers_for_cuda(shape):
    x, *matrices = (
        jax.ShapeDtypeStruct(s, jnp.bfloat16)
        for s in ((shape.rows, shape.contracted), *((shape.contracted, n) for n in shape.widths))
    )
    traced = jax.jit(lambda *a: skinny_gemm(*a, implementation="mosaic")).trace(x, *matrices)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("skinny_gemm") and text.count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    "shapes_given, message",
    [
        (((4, 8),), "no matrix given"),
        (((4, 8), (7, 3)), r"rows are 8 wide, matrices\[0\] takes 7"),
        (((4, 8), (8, 3), (8,)), r"matrices\[1\] has shape \(8,\), expected 2 dimensions"),
        (((2, 4, 8), (8, 3)), "x_MK has shape"),
    ],
)
def test_refuses(shapes_given, message):
    with pytest.raises(ValueError, match=message):
        skinny_gemm(*map(jnp.ones, shapes_given))


@pytest.mark.parametrize("dtype", ["float16", "int32", "bf16"])
def test_refuses_results_of_other_dtypes(dtype):
    x = jnp.ones((4, 8), jnp.bfloat16)
    message = f"skinny_gemm: out_dtype={dtype}, choose bfloat16 or float32"
    with pytest.raises(ValueError, match=message):
        skinny_gemm(x, x.T, out_dtype=dtype)


@pytest.mark.parametrize(
    "dtype, rows, contracted, width",
    [
        ("float32", 4, 64, 64),
        ("bfloat16", 65, 64, 64),
        ("bfloat16", 4, 96, 64),
        ("float16", 4, 64, 8),
    ],
)
def test_mosaic_never_falls_back(dtype, rows, contracted, width):
    with pytest.raises(ValueError, match=f"multiples of 64 .*, got {dtype}, {rows}, {contracted}"):
        skinny_gemm(
            jnp.ones((rows, contracted), dtype),
            jnp.ones((contracted, width), dtype),
            implementation="mosaic",
        )
