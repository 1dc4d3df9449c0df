"""rms_norm: both implementations against float64; the Hopper kernel interpreted, lowered, and on a
GPU with `pytest -m gpu tests/kernels/test_rms_norm.py`.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import rms_norm
from pallas_kernels.rms_norm import shapes
from tests.kernels import helpers, interpreted_norm

# Of the reference in 16 bits the weight's gradient: it multiplies what was rounded, and is.
ROUNDING = {"bfloat16": 5e-3, "float16": 7e-4, "float32": 1e-6, "float64": 1e-14}
KERNELS = {"bfloat16": 3e-3, "float16": 4e-4}


def assert_close(result, limit):
    assert set(result) == {"normed", "dx", "dweight", "passed"}
    assert max(result["normed"], result["dx"]) <= limit
    assert result["passed"]


@pytest.mark.parametrize("dtype", ROUNDING)
def test_equals_float64(dtype):
    with helpers.strict_types():
        result = interpreted_norm.norm(interpreted_norm.Case(50, 20, dtype), "reference")
    assert_close(result, ROUNDING[dtype])
    assert result["dweight"] <= 2 * ROUNDING[dtype]


@pytest.fixture(scope="session")
def interpreted():
    return helpers.interpret(*(f"norm {name}" for name in interpreted_norm.CASES))


@pytest.mark.parametrize("name", interpreted_norm.CASES)
def test_mosaic_equals_float64(interpreted, name):
    result = helpers.errors_of(interpreted[f"norm {name}"])
    assert_close(result, KERNELS[interpreted_norm.CASES[name].dtype])
    assert result["dweight"] <= 1e-6


def test_mosaic_has_no_races(interpreted):
    (searched,) = (result for result in interpreted.values() if "races" in result)
    assert searched["launches"] == 1
    assert not searched["races"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*interpreted_norm.CASES, "large"])
def test_mosaic_equals_float64_on_a_gpu(name):
    helpers.require_hopper()
    case = interpreted_norm.CASES.get(name, interpreted_norm.Case(5_001, 6144))
    first = interpreted_norm.norm(case, "mosaic")
    assert_close(first, KERNELS[case.dtype])
    assert first["dweight"] <= 3e-6
    assert all(interpreted_norm.norm(case, "mosaic") == first for _ in range(2))


@pytest.mark.parametrize("shape", shapes.PRODUCTION)
def test_mosaic_lowers_for_cuda(shape):
    def gradients(x, weight, dpassed, dnormed):
        def run(x, weight):
            return rms_norm(x, weight, 1e-5, implementation="mosaic")

        return jax.vjp(run, x, weight)[1]((dpassed, dnormed))

    rows = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    weight = jax.ShapeDtypeStruct((shape.width,), jnp.float32)
    traced = jax.jit(gradients).trace(rows, weight, rows, rows)
    assert "rms_norm_gradient" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": (6, 8, 1)}, "x_RD has shape .* expected 2 dimensions"),
        ({"weight": (7,)}, r"must be \[R, D\] and \[D\]"),
        ({"dtype": "int32"}, "is int32, expected a floating dtype"),
    ],
)
def test_refuses(change, message):
    given = {"x": (6, 8), "weight": (8,), "dtype": "float32"} | change
    with pytest.raises(ValueError, match=message):
        rms_norm(jnp.ones(given["x"], given["dtype"]), jnp.ones(given["weight"]), 1e-5)


@pytest.mark.parametrize("dtype, width", [("float32", 128), ("bfloat16", 192), ("bfloat16", 6272)])
def test_mosaic_never_falls_back(dtype, width):
    with pytest.raises(ValueError, match=f"multiples of 128 .*, got {dtype} and"):
        rms_norm(jnp.ones((8, width), dtype), jnp.ones(width), 1e-5, implementation="mosaic")
