"""absorb_query and expand_values: both implementations against float64; the Hopper kernels
interpreted, lowered, and on a GPU with `pytest -m gpu tests/kernels/test_mla_heads.py`.
"""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import absorb_query, expand_values
from pallas_kernels.mla_heads import MAX_TOKENS, mosaic
from tests.kernels import helpers, interpreted_heads

ROUNDING = {"bfloat16": 5e-3, "float16": 6e-4, "float32": 1e-6, "float64": 1e-14}


def assert_close(errors, dtype):
    assert set(errors) == {"latent", "rope", "values"}
    assert all(error <= ROUNDING[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("dtype", ROUNDING)
def test_equals_float64(dtype):
    case = interpreted_heads.Case(5, 3, 2, 7, 6, 20, 9, dtype)
    with helpers.strict_types():
        assert_close(interpreted_heads.heads(case, "reference"), dtype)


@pytest.fixture(scope="session")
def interpreted():
    return helpers.interpret(*(f"heads {name}" for name in interpreted_heads.CASES))


@pytest.mark.parametrize("name", interpreted_heads.CASES)
def test_mosaic_equals_float64(interpreted, name):
    result = helpers.errors_of(interpreted[f"heads {name}"])
    assert_close(result, interpreted_heads.CASES[name].dtype)


def test_mosaic_has_no_races(interpreted):
    (searched,) = (result for result in interpreted.values() if "races" in result)
    assert searched["launches"] == 2
    assert not searched["races"]


def test_a_case_refills_its_stages():
    assert interpreted_heads.CASES["long"].latent // mosaic.PIECE > mosaic.STAGES
    assert mosaic.ROWS == MAX_TOKENS


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", interpreted_heads.CASES.values())
def test_mosaic_equals_float64_on_a_gpu(case):
    helpers.require_hopper()
    first = interpreted_heads.heads(case, "mosaic")
    assert_close(first, case.dtype)
    assert all(interpreted_heads.heads(case, "mosaic") == first for _ in range(2))


@pytest.mark.parametrize("tokens, heads, terms", [(1, 16, 2), (64, 64, 1), (13, 2, 1)])
def test_mosaic_lowers_for_cuda(tokens, heads, terms):
    def shape(*s, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(s, dtype)

    angles = shape(tokens, 32)
    kv_b = shape(512, heads, 256, dtype=jnp.bfloat16)
    x = shape(tokens, heads, 512, dtype=jnp.bfloat16)

    def run(terms, kv_b, cos, sin, x):
        query = absorb_query(terms, kv_b, cos, sin, implementation="mosaic")
        return query, expand_values(x, kv_b, value_dim=128, implementation="mosaic")

    traced = jax.jit(run).trace(shape(terms, tokens, heads * 192), kv_b, angles, angles, x)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("absorb_query") and text.count("expand_values")
    assert text.count("mosaic_gpu_v2") == 2


@pytest.mark.parametrize(
    "terms, kv_b, cos, sin, message",
    [
        ((2, 4, 30), (8, 3, 12), (4, 2), (4, 3), "cosines"),
        ((2, 4, 30), (8, 3, 12), (5, 2), (5, 2), "4 tokens, cosines"),
        ((2, 4, 31), (8, 3, 12), (4, 2), (4, 2), "don't fit"),
        ((2, 4, 30), (8, 3, 5), (4, 2), (4, 2), "don't fit"),
        ((0, 4, 30), (8, 3, 12), (4, 2), (4, 2), "don't fit"),
        ((4, 30), (8, 3, 12), (4, 2), (4, 2), "terms_SMX has shape"),
    ],
)
def test_query_refuses(terms, kv_b, cos, sin, message):
    with pytest.raises(ValueError, match=message):
        absorb_query(*map(jnp.ones, (terms, kv_b, cos, sin)))


@pytest.mark.parametrize(
    "x, kv_b, value_dim",
    [((4, 3, 7), (8, 3, 12), 4), ((4, 2, 8), (8, 3, 12), 4), ((4, 3, 8), (8, 3, 12), 13)],
)
def test_values_refuse(x, kv_b, value_dim):
    with pytest.raises(ValueError, match="don't fit"):
        expand_values(jnp.ones(x), jnp.ones(kv_b), value_dim=value_dim)


@pytest.mark.parametrize(
    "dtype, tokens, rope, latent, width",
    [
        ("float32", 4, 64, 64, 128),
        ("bfloat16", 65, 64, 64, 128),
        ("bfloat16", 4, 32, 64, 128),
        ("bfloat16", 4, 64, 64, 164),
    ],
)
def test_mosaic_never_falls_back(dtype, tokens, rope, latent, width):
    terms, angles = jnp.ones((2, tokens, 2 * (64 + rope))), jnp.ones((tokens, rope // 2))
    kv_b = jnp.ones((latent, 2, width), dtype)
    message = f"few terms, got {dtype} and float32, {tokens}, {rope}, 64, {latent} and {width}, 2"
    with pytest.raises(ValueError, match=message):
        absorb_query(terms, kv_b, angles, angles, implementation="mosaic")


@pytest.mark.parametrize("dtype, tokens, latent", [("float32", 4, 64), ("bfloat16", 4, 96)])
def test_values_never_fall_back(dtype, tokens, latent):
    x, kv_b = jnp.ones((tokens, 2, latent), dtype), jnp.ones((latent, 2, 128), dtype)
    with pytest.raises(ValueError, match=f"as dims, got {dtype}, {tokens} and"):
        expand_values(x, kv_b, value_dim=64, implementation="mosaic")
