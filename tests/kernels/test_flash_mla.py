import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_mla
from pallas_kernels.flash_mla import reference
from tests.kernels import helpers

BATCH, HEADS, NOPE, ROPE, VALUE = 2, 3, 10, 6, 7
SCALE = 0.3
TOLERANCE = {"bfloat16": 1e-2, "float32": 2e-6, "float64": 1e-13}


def operands(tokens, dtype, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q = draw(BATCH, tokens, HEADS, NOPE + ROPE)
    k, rope = draw(BATCH, tokens, HEADS, NOPE), draw(BATCH, tokens, ROPE)
    v, dout = draw(BATCH, tokens, HEADS, VALUE), draw(BATCH, tokens, HEADS, VALUE)
    segments = np.sort(rng.integers(0, 4, (BATCH, tokens)), axis=1)
    segments[1, 3:5] = 9  # one id amid others: equality decides, not order
    return (q, k, v, rope), jnp.asarray(segments, jnp.int32), dout


def naive(q, k, v, rope, segments):
    tokens = q.shape[1]
    keys = np.concatenate([k, np.broadcast_to(rope[:, :, None], (*k.shape[:3], ROPE))], axis=3)
    out = np.zeros((*q.shape[:3], VALUE))
    for b, h in np.ndindex(BATCH, HEADS):
        for t in range(tokens):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            scores = SCALE * keys[b, seen, h] @ q[b, t, h]
            weights = np.exp(scores - scores.max())
            out[b, t, h] = weights @ v[b, seen, h] / weights.sum()
    return out


@jax.jit
def value_and_gradients(arrays, segments, dout):
    def attend(q, k, v, rope):
        return flash_mla(q, k, v, scale=SCALE, segment_ids=segments, k_rope=rope)

    out, vjp = jax.vjp(attend, *arrays)
    return out, *vjp(dout)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_naive(dtype):
    with helpers.strict_types():
        arrays, segments, dout = operands(17, dtype)
        wide = [np.asarray(x, np.float64) for x in arrays]
        actual = value_and_gradients(arrays, segments, dout)
        assert all(x.dtype == dtype for x in actual)
        expected = naive(*wide, np.asarray(segments))
        assert helpers.relative_error(actual[0], expected) <= TOLERANCE[dtype]
        exact = value_and_gradients(tuple(map(jnp.asarray, wide)), segments, jnp.float64(dout))
        for got, want in zip(actual, exact, strict=True):
            assert helpers.relative_error(got, want) <= TOLERANCE[dtype]


def test_gradients_equal_finite_differences():
    with helpers.strict_types():
        arrays, segments, dout = operands(17, "float64")
        gradients = value_and_gradients(arrays, segments, dout)[1:]
        rng = np.random.default_rng(8)
        for i, gradient in enumerate(gradients):
            step = 1e-5 * rng.standard_normal(arrays[i].shape)
            ends = []
            for sign in (1, -1):
                moved = list(arrays)
                moved[i] = arrays[i] + sign * step
                wide = [np.asarray(x) for x in moved]
                ends.append(np.sum(naive(*wide, np.asarray(segments)) * dout))
            assert np.isclose(ends[0] - ends[1], 2 * np.sum(gradient * step), rtol=1e-6)


def test_chunks_equal_one_piece(monkeypatch):
    """Twenty-nine tokens in chunks of eight: the last chunk is padded."""
    with helpers.strict_types():
        arrays, segments, dout = operands(29, "float64")
        whole = value_and_gradients(arrays, segments, dout)
        monkeypatch.setattr(reference, "WHOLE_UP_TO", 8)
        monkeypatch.setattr(reference, "CHUNK", 8)
        chunked = value_and_gradients.__wrapped__(arrays, segments, dout)
        for got, want in zip(chunked, whole, strict=True):
            assert helpers.relative_error(got, want) <= 1e-14


def test_long_sequences_never_hold_all_scores():
    tokens = 2048
    spec = [
        jax.ShapeDtypeStruct((1, tokens, 2, width), jnp.float32) for width in (NOPE, NOPE, VALUE)
    ]

    def gradients(q, k, v):
        return jax.grad(lambda *x: flash_mla(*x, scale=SCALE).sum(), (0, 1, 2))(q, k, v)

    memory = jax.jit(gradients).lower(*spec).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * tokens * tokens * 4


@pytest.mark.parametrize("chunk", [8, 256])
def test_queries_with_an_offset_are_rows_of_the_whole(monkeypatch, chunk):
    """Queries 6 to 16 of 29, value and gradients."""
    monkeypatch.setattr(reference, "WHOLE_UP_TO", chunk)
    monkeypatch.setattr(reference, "CHUNK", chunk)
    first, count = 6, 11
    with helpers.strict_types():
        (q, *keys), segments, dout = operands(29, "float64")
        rows = slice(first, first + count)
        part = jnp.zeros_like(dout).at[:, rows].set(dout[:, rows])
        whole = value_and_gradients((q, *keys), segments, part)

        @jax.jit
        def gradients(arrays, offset):
            def attend(q, k, v, rope):
                extra = {"segment_ids": segments, "k_rope": rope, "q_offset": offset}
                return flash_mla(q, k, v, scale=SCALE, **extra)

            out, vjp = jax.vjp(attend, *arrays)
            return out, *vjp(dout[:, rows])

        got = gradients((q[:, rows], *keys), first)
        wanted = whole[0][:, rows], whole[1][:, rows], *whole[2:]
        for a, b in zip(got, wanted, strict=True):
            assert helpers.relative_error(a, b) <= 1e-14


def test_without_rope_and_segments():
    (q, k, v, _), _, _ = operands(11, "float32")
    whole = flash_mla(q[..., :NOPE], k, v, scale=SCALE)
    ones = jnp.ones((BATCH, 11), jnp.int32)
    again = flash_mla(q[..., :NOPE], k, v, scale=SCALE, segment_ids=ones)
    assert helpers.same_bits(whole, again)
    assert np.allclose(whole[:, 0], v[:, 0], atol=1e-6)


def test_two_runs_give_the_same_bits():
    args = operands(600, "float32")
    assert helpers.same_bits(value_and_gradients(*args), value_and_gradients(*args))


def test_no_float_scatter():
    assert not helpers.float_scatters(value_and_gradients, *operands(600, "float32"))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k=jnp.zeros((2, 5, 3, 8))), "queries are 9 wide, keys"),
        (dict(v=jnp.zeros((2, 4, 3, 7))), "must agree in batch, tokens and heads"),
        (dict(q=jnp.zeros((2, 4, 3, 9))), "must agree in batch, tokens and heads"),
        (dict(q=jnp.zeros((2, 6, 3, 9)), q_offset=0), "6 queries, 5 keys"),
        (dict(rope=jnp.zeros((2, 4, 4))), "k_rope is"),
        (dict(rope=jnp.zeros((2, 5, 3))), "queries are 9 wide, keys .with k_rope. 12"),
        (dict(segments=jnp.zeros((2, 6), int)), "segment_ids is"),
        (dict(segments=jnp.zeros((2, 5))), "expected an integer dtype"),
        (dict(implementation="cudnn"), "choose None or one of 'reference'"),
    ],
)
def test_refuses(change, message):
    args = dict(q=jnp.zeros((2, 5, 3, 9)), k=jnp.zeros((2, 5, 3, 9)), v=jnp.zeros((2, 5, 3, 7)))
    args |= dict(rope=None, segments=None, q_offset=None, implementation=None) | change
    with pytest.raises(ValueError, match=message):
        flash_mla(
            args["q"],
            args["k"],
            args["v"],
            scale=SCALE,
            segment_ids=args["segments"],
            k_rope=args["rope"],
            q_offset=args["q_offset"],
            implementation=args["implementation"],
        )
