"""flash_mla's Hopper kernels where there is no GPU: interpreted, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import flash_mla
from pallas_kernels.flash_mla import schedule, shapes
from tests.kernels import helpers
from tests.kernels.interpreted_attention import ATTENTIONS, NAMES

QUICK = ("packed", "one segment at the end")
SLOW = tuple(name for name in ATTENTIONS if name not in QUICK)


@pytest.fixture(scope="module")
def interpreted():
    return helpers.interpret(*(f"attention {name}" for name in QUICK))


def assert_as_good_as_the_reference(result):
    for name in NAMES:
        if name in result:
            # Roundings of few numbers scatter: on a whole sequence it is less than 1.3 times.
            assert result[name] <= max(1.3 * result[f"{name}, reference"], 3.2e-3), name
    assert result.get("one head at a time", True)


@pytest.mark.parametrize("case", QUICK)
def test_is_as_good_as_the_reference(interpreted, case):
    assert_as_good_as_the_reference(interpreted[f"attention {case}"])


def test_no_races(interpreted):
    result = interpreted["attention packed"]
    assert result["launches"] == 3
    assert result["races"] is False


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_is_as_good_as_the_reference_in_more_cases(case):
    (result,) = helpers.interpret(f"attention {case}").values()
    assert_as_good_as_the_reference(result)


def spec(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


def gradients(q, k, v, rope, segments, offset, dout):
    """Value and gradients by the Mosaic implementation."""

    def attend(q, k, v, rope):
        return flash_mla(
            q,
            k,
            v,
            scale=0.1,
            k_rope=rope,
            segment_ids=segments,
            q_offset=offset,
            implementation="mosaic",
        )

    out, vjp = jax.vjp(attend, q, k, v, rope)
    return out, *vjp(dout)


def lower(shape, *, tokens=None, segments=False, dtype=jnp.bfloat16):
    batch, keys, heads, nope, rope, value = shape
    queries = keys if tokens is None else tokens
    args = (
        spec(batch, queries, heads, nope + rope, dtype=dtype),
        spec(batch, keys, heads, nope, dtype=dtype),
        spec(batch, keys, heads, value, dtype=dtype),
        spec(batch, keys, rope, dtype=dtype) if rope else None,
        spec(batch, keys, dtype=jnp.int32) if segments else None,
        None if tokens is None else spec(dtype=jnp.int32),
        spec(batch, queries, heads, value, dtype=dtype),
    )
    return jax.jit(gradients).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("segments", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lowers_for_cuda(segments):
    assert lower(shapes.PRODUCTION[0], segments=segments).count("mosaic_gpu") >= 3


@pytest.mark.slow
@pytest.mark.parametrize("shape", shapes.PRODUCTION[1:])
def test_other_shapes_lower_for_cuda(shape):
    assert lower(shape, tokens=shape.tokens // 8, segments=True).count("mosaic_gpu") >= 3


WIDTHS = (
    (64, 0, 64),
    (64, 64, 64),
    (128, 64, 64),
    (64, 0, 256),
    (64, 64, 256),
    (192, 0, 192),
    (256, 0, 128),
    (192, 64, 64),
)


@pytest.mark.slow
@pytest.mark.parametrize("widths", WIDTHS)
def test_widths_fit(widths):
    shape = shapes.Shape(1, 300, 2, *widths)
    text = lower(shape, segments=True, dtype=jnp.float16)
    assert text.count("mosaic_gpu") >= 3


def test_scratch_is_bounded():
    """At 32k tokens dS is kept of two heads at a time."""
    shape = shapes.PRODUCTION[1]
    tiles = schedule.num_tiles(shape.tokens, shape.tokens, None)
    assert f"tensor<1x2x{tiles}x64x64xbf16>" in lower(shape)


def test_lowers_inside_shard_map():
    """Batch and heads cut, with types checked: unchecked, gradients through psum are wrong."""
    axes = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axes, devices=jax.devices()[:4])
    heads, shared = P("data", None, "model"), P("data")

    def run(q, k, v, rope, segments, dout):
        return gradients(q, k, v, rope, segments, None, dout)

    split = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(heads, heads, heads, shared, shared, heads),
        out_specs=(heads, heads, heads, heads, shared),
    )
    args = (
        spec(2, 256, 4, 192),
        spec(2, 256, 4, 128),
        spec(2, 256, 4, 128),
        spec(2, 256, 64),
        spec(2, 256, dtype=jnp.int32),
        spec(2, 256, 4, 128),
    )
    lowered = jax.jit(split).trace(*args).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 3


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dtype="float32"), "got float32"),
        (dict(nope=96), "96, 64 and 128"),
        (dict(value=72), "128, 64 and 72"),
        (dict(nope=256), "256, 64 and 128"),
        (dict(nope=192, value=192), "192, 64 and 192"),
        (dict(scale=-1.0), "scale -1.0"),
    ],
)
def test_never_falls_back(change, message):
    options = dict(dtype="bfloat16", nope=128, rope=64, value=128, scale=0.1) | change
    widths = options["nope"] + options["rope"], options["nope"], options["value"]
    q, k, v = (jnp.zeros((1, 4, 2, width), options["dtype"]) for width in widths)
    rope = jnp.zeros((1, 4, options["rope"]), options["dtype"])
    run = functools.partial(flash_mla, q, k, v, scale=options["scale"], k_rope=rope)
    with pytest.raises(ValueError, match=message):
        run(implementation="mosaic")
    assert run().shape == v.shape
