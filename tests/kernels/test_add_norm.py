"""add_norm: both implementations against float64; the Hopper kernel interpreted, lowered, and on a
GPU with `pytest -m gpu tests/kernels/test_add_norm.py`.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import add_norm
from pallas_kernels.add_norm import Rows
from tests.kernels import helpers, interpreted_add_norm

ROUNDING = {"bfloat16": 5e-3, "float16": 6e-4, "float32": 2e-7, "float64": 1e-15}


def assert_close(errors, dtype):
    assert set(errors) == {"sums", "norms"}
    assert all(error <= ROUNDING[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("dtype", ROUNDING)
def test_equals_float64(dtype):
    with helpers.strict_types():
        assert_close(interpreted_add_norm.add_norm("reference", dtype), dtype)


def test_mosaic_equals_float64_and_has_no_races():
    result = helpers.interpret("add_norm")["add_norm"]
    assert result["launches"] == 1 and not result["races"]
    assert_close(helpers.errors_of(result), "bfloat16")


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mosaic_equals_float64_on_a_gpu(dtype):
    helpers.require_hopper()
    first = interpreted_add_norm.add_norm("mosaic", dtype)
    assert_close(first, dtype)
    assert all(interpreted_add_norm.add_norm("mosaic", dtype) == first for _ in range(2))


@pytest.mark.parametrize("width", [768, 2048, 6144])
def test_mosaic_lowers_for_cuda(width):
    base, weight = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, width), (width,)))
    terms = jax.ShapeDtypeStruct((4, 64, width), jnp.float32)

    def run(*rows):
        return add_norm(Rows(*rows), Rows(rows[0], rows[1]), eps=1e-5, implementation="mosaic")

    text = jax.jit(run).trace(weight, base, terms).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("add_norm") and text.count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize(
    "weight, base, terms, message",
    [
        ((8,), None, None, "numbers of rows are"),
        ((8,), (4, 7), None, "8 weights, base_MD has shape"),
        ((8,), None, (2, 4, 7), "8 weights, terms_SMN has shape"),
        ((8,), None, (0, 4, 8), "8 weights, terms_SMN has shape"),
        ((8,), (4, 8), (2, 5, 8), r"numbers of rows are \[4, 5\]"),
        ((8,), (4, 8), (5, 8), "terms_SMN has shape"),
        ((2, 8), (4, 8), None, "weight_D has shape"),
    ],
)
def test_refuses(weight, base, terms, message):
    given = (None if shape is None else jnp.ones(shape) for shape in (weight, base, terms))
    with pytest.raises(ValueError, match=message):
        add_norm(Rows(*given), eps=1e-5)


def test_refuses_no_rows():
    with pytest.raises(ValueError, match="no rows given"):
        add_norm(eps=1e-5)


@pytest.mark.parametrize("dtype, width", [("float32", 128), ("bfloat16", 192)])
def test_mosaic_never_falls_back(dtype, width):
    rows = Rows(jnp.ones(width, dtype), jnp.ones((4, width), dtype))
    with pytest.raises(ValueError, match=f"of 128 columns, got {dtype}, 4 and .{width}"):
        add_norm(rows, eps=1e-5, implementation="mosaic")
