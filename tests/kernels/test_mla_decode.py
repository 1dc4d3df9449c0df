import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import mla_decode
from pallas_kernels.mla_decode import mosaic, shapes
from tests.kernels import helpers
from tests.kernels import interpreted as interpreted_cases

BATCH, TOKENS, HEADS, ENTRIES, LATENT, ROPE = 4, 2, 3, 13, 10, 6
SCALE = 0.3
TOLERANCE = {"bfloat16": 1e-2, "float32": 2e-6, "float64": 1e-13}
LENGTHS = np.asarray([13, 7, 2, 1])  # the last row's first query stands before the cache


def operands(dtype):
    rng = np.random.default_rng(5)
    q = rng.standard_normal((BATCH, TOKENS, HEADS, LATENT + ROPE))
    cache = rng.standard_normal((BATCH, ENTRIES, LATENT + ROPE))
    for b, length in enumerate(LENGTHS):
        cache[b, length:] = np.nan
    return jnp.asarray(q, dtype), jnp.asarray(cache, dtype), jnp.asarray(LENGTHS, jnp.int32)


def naive(q, cache):
    q, cache = np.asarray(q, np.float64), np.asarray(cache, np.float64)
    out = np.zeros((BATCH, TOKENS, HEADS, LATENT))
    for b, t, h in np.ndindex(BATCH, TOKENS, HEADS):
        position = LENGTHS[b] - TOKENS + t
        if position >= 0:
            seen = cache[b, : position + 1]
            scores = SCALE * seen @ q[b, t, h]
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ seen[:, :LATENT] / weights.sum()
    return out


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_naive(dtype):
    with helpers.strict_types():
        q, cache, lengths = operands(dtype)
        out = mla_decode(q, cache, lengths, scale=SCALE, value_dim=LATENT)
        assert out.dtype == dtype
        assert helpers.relative_error(out, naive(q, cache)) <= TOLERANCE[dtype]
        assert not np.any(out[3, 0]) and np.any(out[3, 1])


def test_paged_cache_gives_the_same_bits():
    q, cache, lengths = operands("float32")
    cache = jnp.pad(cache, ((0, 0), (0, 2), (0, 0)))
    pages, tables = helpers.paged(np.random.default_rng(1), cache, LENGTHS, 5)
    run = functools.partial(mla_decode, scale=SCALE, value_dim=LATENT)
    assert helpers.same_bits(run(q, pages, lengths, block_tables_BP=tables), run(q, cache, lengths))


def test_two_runs_give_the_same_bits():
    args = operands("float32")
    first, second = (mla_decode(*args, scale=SCALE, value_dim=LATENT) for _ in range(2))
    assert helpers.same_bits(first, second)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(cache=jnp.zeros((2, 5, 8))), "queries are 9 wide, cache entries 8"),
        (dict(lengths=jnp.zeros(3, int)), "batch is 2 in q_BTHU"),
        (dict(lengths=jnp.zeros(2)), "expected an integer dtype"),
        (dict(value_dim=10), "value_dim is 10, expected 1 to 9"),
        (dict(tables=jnp.zeros((3, 2), int)), "batch is 2 in q_BTHU, 3 in block_tables_BP"),
        (dict(tables=jnp.zeros((2, 2))), "block_tables_BP is float32, expected an integer"),
        (dict(implementation="mosaik"), "choose None or one of 'reference', 'mosaic'"),
    ],
)
def test_refuses(change, message):
    args = dict(q=jnp.zeros((2, 1, 3, 9)), cache=jnp.zeros((2, 5, 9)), lengths=jnp.ones(2, int))
    args |= dict(value_dim=6, implementation=None, tables=None) | change
    with pytest.raises(ValueError, match=message):
        mla_decode(
            args["q"],
            args["cache"],
            args["lengths"],
            scale=SCALE,
            value_dim=args["value_dim"],
            block_tables_BP=args["tables"],
            implementation=args["implementation"],
        )


@pytest.mark.parametrize("implementation", ["reference", "mosaic"])
@pytest.mark.parametrize("q", [(0, 1, 3, 128), (2, 0, 3, 128), (2, 1, 0, 128)])
@pytest.mark.parametrize("page", [0, 64])
def test_no_queries(implementation, q, page):
    cache = jnp.ones((q[0], 128, 128), jnp.bfloat16)
    tables = jnp.zeros((q[0], 2), int) if page else None
    out = mla_decode(
        jnp.ones(q, jnp.bfloat16),
        cache.reshape(-1, page, 128) if page else cache,
        jnp.full(q[0], 5),
        scale=SCALE,
        value_dim=64,
        block_tables_BP=tables,
        implementation=implementation,
    )
    assert out.shape == (*q[:3], 64) and out.dtype == jnp.bfloat16


@pytest.mark.parametrize("entries, pages", [(0, None), (5, 0)])
def test_an_empty_cache_gives_zeros(entries, pages):
    """Without block tables, and with tables of no page."""
    q, cache = jnp.ones((2, 1, 3, 9)), jnp.ones((2, entries, 9))
    tables = None if pages is None else jnp.zeros((2, pages), int)
    options = dict(scale=SCALE, value_dim=6, block_tables_BP=tables)
    out = mla_decode(q, cache, jnp.zeros(2, int), **options)
    assert out.shape == (2, 1, 3, 6) and not np.any(out)


mosaic_decode = functools.partial(mla_decode, scale=SCALE, implementation="mosaic")


def spec(*dims, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(dims, dtype)


INTERPRETED = "few heads, paged", "two row tiles", "many splits"


@pytest.fixture(scope="module")
def interpreted():
    return helpers.interpret(*(f"decode {name}" for name in INTERPRETED))


def assert_exact_enough(result):
    assert result["out"] <= 1.3 * result["reference"] <= 1e-2
    assert result["before"] == 0


def test_a_case_joins_more_splits_than_are_read_at_once():
    case = interpreted_cases.DECODES["many splits"]
    assert case.entries // (2 * mosaic.TILE) > mosaic.JOINED


@pytest.mark.parametrize("case", INTERPRETED)
def test_mosaic_equals_exact_attention(interpreted, case):
    assert_exact_enough(interpreted[f"decode {case}"])


@pytest.mark.slow
def test_mosaic_equals_exact_attention_in_more_cases():
    results = helpers.interpret("decode three tokens", "decode 64 heads")
    assert len(results) == 2
    for result in results.values():
        assert_exact_enough(result)


def test_mosaic_has_no_races(interpreted):
    result = interpreted["decode two row tiles"]
    assert result["launches"] == 2
    assert result["races"] is False


# Heads and tokens that don't fill tiles of rows.
ODD = [shapes.LONG._replace(tokens=t, heads=h) for t, h in ((1, 12), (3, 6), (1, 1))]


@pytest.mark.parametrize("page", [0, 64])
@pytest.mark.parametrize("shape", [*shapes.PRODUCTION, shapes.LONG, *ODD])
def test_mosaic_lowers_for_cuda(shape, page):
    batch, tokens, heads, entries, latent, rope = shape
    cache = spec(batch, entries, latent + rope)
    tables = None
    if page:
        cache = spec(batch * entries // page, page, latent + rope)
        tables = spec(batch, entries // page, dtype="int32")
    q, lengths = spec(batch, tokens, heads, latent + rope), spec(batch, dtype="int32")

    def run(q, cache, lengths, tables):
        return mosaic_decode(q, cache, lengths, value_dim=latent, block_tables_BP=tables)

    traced = jax.jit(run).trace(q, cache, lengths, tables)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", [*interpreted_cases.DECODES, "released width"])
def test_mosaic_equals_exact_attention_on_a_gpu(case):
    helpers.require_hopper()
    wide = interpreted_cases.Decode(2, 64, 512, 64, 1024, (1000, 129, 1, 0), page=64)
    assert_exact_enough(interpreted_cases.decode(interpreted_cases.DECODES.get(case, wide)))


@pytest.mark.parametrize(
    "operands",
    [
        (spec(2, 1, 4, 128), spec(2, 128, 128), spec(2, dtype="int32")),
        (spec(4, 1, 8, 128), spec(4, 128, 128), spec(4, dtype="int32")),
    ],
)
def test_mosaic_lowers_inside_shard_map(operands):
    """With types checked, cut by heads over a shared cache and by sequences."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    heads = P(None, None, "data")
    specs = (heads, P(), P()) if operands[0].shape[0] == 2 else (P("data"),) * 3
    run = functools.partial(mosaic_decode, value_dim=64)
    split = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=specs[0])
    lowered = jax.jit(split).trace(*operands).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    "dtype, entries, width, value_dim",
    [
        ("float32", 64, 128, 64),
        ("bfloat16", 72, 128, 64),
        ("bfloat16", 64, 96, 64),
        ("bfloat16", 64, 128, 32),
        ("bfloat16", 64, 640, 512),
        ("bfloat16", 64, 576, 576),
        ("bfloat16", 0, 128, 64),
    ],
)
def test_mosaic_never_falls_back(dtype, entries, width, value_dim):
    q, cache = jnp.zeros((2, 1, 3, width), dtype), jnp.zeros((2, entries, width), dtype)
    with pytest.raises(ValueError, match=f"got {dtype}, {value_dim}, {width} and {entries}"):
        mosaic_decode(q, cache, jnp.ones(2, int), value_dim=value_dim)


@pytest.mark.parametrize(
    "tables, implementation", [((), "mosaic"), ((spec(2, 1, dtype="int32"),), "reference")]
)
def test_refuses_to_be_differentiated(tables, implementation):
    def loss(q, cache, lengths, tables=None):
        options = dict(block_tables_BP=tables, implementation=implementation)
        return jnp.sum(mla_decode(q, cache, lengths, scale=SCALE, value_dim=64, **options))

    args = spec(2, 1, 3, 128), spec(2, 64, 128), spec(2, dtype="int32")
    with pytest.raises(ValueError, match="only implementation='reference' over a cache without"):
        jax.eval_shape(jax.grad(loss), *args, *tables)


@pytest.mark.parametrize("shape", [*shapes.PRODUCTION, shapes.LONG])
def test_splits_of_production_shapes_fill_whole_waves(shape):
    batch, tokens, heads, entries, latent, rope = shape
    cut = mosaic.plan((batch, tokens, heads, latent + rope), entries, latent, 2)
    ctas = batch * -(-tokens * heads // 64) * -(-entries // cut.split)
    assert ctas / (-(-ctas // 132) * 132) > 0.95
    assert cut.stages == 2
