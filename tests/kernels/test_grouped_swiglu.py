"""grouped_swiglu: both implementations against float64; the Hopper kernel interpreted, lowered, and
on a GPU with `pytest -m gpu tests/kernels/test_grouped_swiglu.py`.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import grouped_swiglu
from pallas_kernels.grouped_swiglu import shapes
from tests.kernels import helpers, interpreted_swiglu

ROUNDING = {"bfloat16": 3e-3, "float16": 4e-4, "float32": 1e-6, "float64": 1e-14}


def assert_close(errors, limit):
    assert set(errors) == {"out", "dwide", "dgates", "tail"}
    assert max(errors["out"], errors["dwide"], errors["dgates"]) <= limit
    assert errors["tail"] == 0


@pytest.mark.parametrize("used", [0, 1, 37, 50])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_equals_float64(dtype, used):
    case = interpreted_swiglu.Case(50, used, 20, dtype)
    with helpers.strict_types():
        assert_close(interpreted_swiglu.swiglu(case, "reference"), ROUNDING[dtype])


@pytest.fixture(scope="session")
def interpreted():
    return helpers.interpret(*(f"swiglu {name}" for name in interpreted_swiglu.CASES))


@pytest.mark.parametrize("name", interpreted_swiglu.CASES)
def test_mosaic_equals_float64(interpreted, name):
    result = helpers.errors_of(interpreted[f"swiglu {name}"])
    assert_close(result, ROUNDING[interpreted_swiglu.CASES[name].dtype])


def test_mosaic_has_no_races(interpreted):
    (searched,) = (result for result in interpreted.values() if "races" in result)
    assert searched["launches"] == 2
    assert not searched["races"]


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [*interpreted_swiglu.CASES, "large"])
def test_mosaic_equals_float64_on_a_gpu(name):
    helpers.require_hopper()
    large = interpreted_swiglu.Case(5_008, 3_001, 1024)
    case = interpreted_swiglu.CASES.get(name, large)
    first = interpreted_swiglu.swiglu(case, "mosaic")
    assert_close(first, ROUNDING[case.dtype])
    assert all(interpreted_swiglu.swiglu(case, "mosaic") == first for _ in range(2))


@pytest.mark.parametrize("shape", shapes.PRODUCTION)
def test_mosaic_lowers_for_cuda(shape):
    def both(wide, gates, dout, used):
        def run(wide, gates):
            return grouped_swiglu(wide, gates, used, implementation="mosaic")

        out, vjp = jax.vjp(run, wide, gates)
        return out, vjp(dout)

    wide, dout = (
        jax.ShapeDtypeStruct((shape.rows, width), jnp.bfloat16)
        for width in (2 * shape.width, shape.width)
    )
    gates = jax.ShapeDtypeStruct((shape.rows,), jnp.float32)
    traced = jax.jit(both).trace(wide, gates, dout, jax.ShapeDtypeStruct((), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "grouped_swiglu_gradient" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"wide": (6, 7)}, r"must be \[R, 2 F\] and \[R\]"),
        ({"gates": (5,)}, r"must be \[R, 2 F\] and \[R\]"),
        ({"gates": (6, 1)}, "expected 1 dimensions"),
        ({"used": 2.0}, "num_rows is float32, expected an integer"),
    ],
)
def test_refuses(change, message):
    given = {"wide": (6, 8), "gates": (6,), "used": 2} | change
    with pytest.raises(ValueError, match=message):
        grouped_swiglu(
            jnp.ones(given["wide"]), jnp.ones(given["gates"]), jnp.asarray(given["used"])
        )


@pytest.mark.parametrize("dtype, width", [("float32", 128), ("bfloat16", 192), ("bfloat16", 64)])
def test_mosaic_never_falls_back(dtype, width):
    with pytest.raises(ValueError, match=f"multiples of 64 .*, got {dtype} and"):
        grouped_swiglu(
            jnp.ones((8, width), dtype), jnp.ones(8), jnp.int32(3), implementation="mosaic"
        )
