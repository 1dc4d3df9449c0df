"""skinny_swiglu and skinny_experts: both implementations against float64; the Hopper kernels
interpreted, lowered, and on a GPU with `pytest -m gpu tests/kernels/test_skinny_ffn.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import HOPPER, made_for, skinny_experts, skinny_swiglu
from pallas_kernels.skinny_ffn import MAX_ROWS, mosaic, reads_selected_experts, shapes
from tests.kernels import helpers, interpreted_ffn
from tests.kernels.interpreted import NUM_SMS

ROUNDING = {"bfloat16": 8e-3, "float16": 1e-3, "float32": 2e-6, "float64": 1e-14}


def assert_close(errors, dtype):
    assert set(errors) == {"swiglu", "experts", "gradients"}
    for name, error in errors.items():
        assert error <= ROUNDING[dtype], name


@pytest.mark.parametrize("dtype", ROUNDING)
def test_equals_float64(dtype):
    case = interpreted_ffn.Case(5, 40, 7, 4, 3, 2, dtype)
    with helpers.strict_types():
        assert_close(interpreted_ffn.ffn(case, "reference"), dtype)


@pytest.fixture(scope="session")
def interpreted():
    return helpers.interpret(*(f"ffn {name}" for name in (*interpreted_ffn.CASES, "left out")))


@pytest.mark.parametrize("name", interpreted_ffn.CASES)
def test_mosaic_equals_float64(interpreted, name):
    result = helpers.errors_of(interpreted[f"ffn {name}"])
    assert_close(result, interpreted_ffn.CASES[name].dtype)


def test_what_is_not_selected_is_left_out(interpreted):
    for found in interpreted["ffn left out"], interpreted_ffn.left_out("reference"):
        assert found["nobody"] == 0
        assert 0 < found["beside"] < 1e6
        assert not found["spoilt"] < 1e6


def test_a_case_refills_its_stages():
    case = interpreted_ffn.CASES["long"]
    assert case.model // mosaic.PIECE > 2 * mosaic.WIDE_STAGES


def test_a_case_gives_a_cta_pieces_of_both_launches_and_a_short_one():
    case = interpreted_ffn.CASES["many experts"]
    used, each = case.experts - 1, mosaic.experts_to_a_part(case.rows)
    assert each == 2 and used % each == 1
    for width, parts, steps, stages in (
        (case.width, used, case.model // mosaic.PIECE, mosaic.WIDE_STAGES),
        (case.model, used // each, each * case.width // mosaic.PIECE, mosaic.DOWN_STAGES),
    ):
        pieces = parts * width // mosaic.PIECE // NUM_SMS
        assert pieces > 2 and pieces * steps > stages


def test_mosaic_has_no_races(interpreted):
    (searched,) = (result for result in interpreted.values() if "races" in result)
    assert searched["launches"] == 3
    assert not searched["races"]


def test_experts_in_use_are_listed_in_order():
    experts = jnp.asarray([[7, 2], [2, 9], [4, 8]])
    listed, number = mosaic.experts_in_use(experts, 8, 6)
    np.testing.assert_array_equal(listed, [2, 4, 7, 8, 8, 8])
    assert number.tolist() == [3]


def test_the_kernel_takes_all_rows_that_are_promised():
    assert mosaic.ROWS == MAX_ROWS


def test_only_the_kernel_reads_what_is_selected():
    x, down = jnp.ones((4, 64), jnp.bfloat16), jnp.ones((3, 64, 64), jnp.bfloat16)
    assert not reads_selected_experts(x, down)
    with made_for(HOPPER):
        assert reads_selected_experts(x, down)
        assert not reads_selected_experts(jnp.ones((65, 64), jnp.bfloat16), down)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", interpreted_ffn.CASES.values())
def test_mosaic_equals_float64_on_a_gpu(case):
    helpers.require_hopper()
    first = interpreted_ffn.ffn(case, "mosaic")
    assert_close(first, case.dtype)
    assert all(interpreted_ffn.ffn(case, "mosaic") == first for _ in range(2))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("shape", shapes.PRODUCTION[:4])
def test_mosaic_equals_the_reference_on_a_gpu(shape):
    helpers.require_hopper()
    run, types = launch_of(shape)
    keys = jax.random.split(jax.random.key(0), len(types))
    operands = [
        (jax.random.normal(key, t.shape) * t.shape[-2] ** -0.5).astype(t.dtype)
        for key, t in zip(keys, types, strict=True)
    ]
    if shape.experts:
        draws = jax.random.split(jax.random.key(1), shape.rows)
        ids = jax.vmap(lambda key: jax.random.permutation(key, shape.experts + 16))(draws)
        operands[2] = ids[:, : shape.selected]
    got, wanted = (jax.jit(run, static_argnums=0)(name, *operands) for name in NAMES)
    assert helpers.relative_error(got, wanted) <= ROUNDING["bfloat16"]
    assert helpers.same_bits(got, jax.jit(run, static_argnums=0)("mosaic", *operands))


NAMES = "mosaic", "reference"


def launch_of(shape):
    """(implementation, *operands) -> result, and what the operands are."""
    M, D, F, X, K = shape

    def floats(*s):
        return jax.ShapeDtypeStruct(s, jnp.bfloat16)

    if not X:
        return lambda name, *a: skinny_swiglu(*a, implementation=name), [
            floats(M, D),
            floats(D, F),
            floats(D, F),
        ]
    return lambda name, *a: skinny_experts(*a, implementation=name), [
        floats(M, D),
        floats(M, K),
        jax.ShapeDtypeStruct((M, K), jnp.int32),
        floats(X, D, 2 * F),
        floats(X, F, D),
    ]


ODD = shapes.Shape(13, 128, 64, 0, 0), shapes.Shape(13, 128, 64, 4, 2)  # rows: no whole tiles


@pytest.mark.parametrize("shape", [*shapes.PRODUCTION, *ODD])
def test_mosaic_lowers_for_cuda(shape):
    run, types = launch_of(shape)
    traced = jax.jit(lambda *a: run("mosaic", *a)).trace(*types)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    name, launches = ("skinny_experts", 2) if shape.experts else ("skinny_swiglu", 1)
    assert text.count(name) and text.count("mosaic_gpu_v2") == launches


@pytest.mark.parametrize(
    "shapes_given, message",
    [
        (((4, 8), (7, 3), (7, 3)), "don't fit"),
        (((4, 8), (8, 3), (8, 4)), "don't fit"),
        (((4, 8), (8, 3), (8,)), r"up_KF has shape \(8,\), expected 2 dimensions"),
    ],
)
def test_swiglu_refuses(shapes_given, message):
    with pytest.raises(ValueError, match=message):
        skinny_swiglu(*map(jnp.ones, shapes_given))


@pytest.mark.parametrize(
    "gates, ids, gate_up, down, message",
    [
        ((4, 2), (4, 2), (3, 8, 10), (3, 4, 8), "don't fit"),
        ((4, 2), (4, 2), (3, 8, 8), (3, 4, 7), "don't fit"),
        ((4, 2), (4, 3), (3, 8, 8), (3, 4, 8), r"gates \(4, 2\) and experts \(4, 3\)"),
        ((4, 2), (4, 2), (8, 8), (3, 4, 8), "gate_up_XDF has shape"),
    ],
)
def test_experts_refuse(gates, ids, gate_up, down, message):
    given = jnp.ones((4, 8)), jnp.ones(gates), jnp.ones(ids, int), jnp.ones(gate_up), jnp.ones(down)
    with pytest.raises(ValueError, match=message):
        skinny_experts(*given)


def test_experts_refuse_ids_that_are_no_integers():
    given = jnp.ones((4, 8)), jnp.ones((4, 2)), jnp.ones((4, 2)), jnp.ones((3, 8, 8))
    with pytest.raises(ValueError, match="experts_MK is float32, expected an integer"):
        skinny_experts(*given, jnp.ones((3, 4, 8)))


@pytest.mark.parametrize(
    "dtype, rows, contracted, width",
    [("float32", 4, 64, 64), ("bfloat16", 65, 64, 64), ("bfloat16", 4, 96, 64)],
)
def test_mosaic_never_falls_back(dtype, rows, contracted, width):
    x, w = jnp.ones((rows, contracted), dtype), jnp.ones((contracted, width), dtype)
    with pytest.raises(ValueError, match=f"multiples of 64 .*, got {dtype}, {rows}, {contracted}"):
        skinny_swiglu(x, w, w, implementation="mosaic")
