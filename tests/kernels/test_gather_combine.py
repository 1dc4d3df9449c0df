import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gather_combine, gather_rows, gather_sum
from tests.kernels import helpers

TOKENS, SELECTED, ROWS, WIDTH = 37, 3, 130, 20
TOLERANCE = {"bfloat16": 4e-3, "float32": 1e-6, "float64": 1e-14}


def routing(seed=0):
    """Slots without repetition, three of them outside the rows, and the token of every row."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(ROWS)[: TOKENS * SELECTED].reshape(TOKENS, SELECTED)
    slots[0, 1], slots[5, 2], slots[7, 0] = ROWS, -1, ROWS + 9
    token_of_row = np.full(ROWS, TOKENS)
    for (t, _), slot in np.ndenumerate(slots):
        if 0 <= slot < ROWS:
            token_of_row[slot] = t
    return jnp.asarray(slots, jnp.int32), jnp.asarray(token_of_row, jnp.int32)


def naive_combine(values, slots, weights, dout):
    values, weights, dout = (np.asarray(x, np.float64) for x in (values, weights, dout))
    out, dvalues, dweights = np.zeros_like(dout), np.zeros_like(values), np.zeros_like(weights)
    for (t, k), slot in np.ndenumerate(np.asarray(slots)):
        if 0 <= slot < ROWS:
            out[t] += weights[t, k] * values[slot]
            dvalues[slot] += weights[t, k] * dout[t]
            dweights[t, k] = dout[t] @ values[slot]
    return out, dvalues, dweights


@jax.jit
def combine_and_gradients(values, slots, weights, dout):
    out, vjp = jax.vjp(lambda v, w: gather_combine(v, slots, w), values, weights)
    return out, *vjp(dout)


@jax.jit
def rows_and_gradient(x, token_of_row, slots, drows):
    rows, vjp = jax.vjp(lambda x: gather_rows(x, token_of_row, slots), x)
    return rows, *vjp(drows)


@jax.jit
def sum_and_gradient(values, token_of_row, slots, dout):
    out, vjp = jax.vjp(lambda values: gather_sum(values, token_of_row, slots), values)
    return out, *vjp(dout)


def combine_operands(dtype, seed=1):
    rng = np.random.default_rng(seed)
    draw = helpers.values_of_many_magnitudes
    values, dout = draw(rng, ROWS, WIDTH), draw(rng, TOKENS, WIDTH)
    weights = rng.uniform(0.1, 1, (TOKENS, SELECTED))
    weights_dtype = np.promote_types(jnp.dtype(dtype), np.float32)
    return (
        jnp.asarray(values, dtype),
        routing()[0],
        jnp.asarray(weights, weights_dtype),
        jnp.asarray(dout, dtype),
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_combine_equals_naive(dtype):
    with helpers.strict_types():
        args = combine_operands(dtype)
        actual = combine_and_gradients(*args)
        assert [x.dtype for x in actual] == [dtype, dtype, args[2].dtype]
        for got, want in zip(actual, naive_combine(*args), strict=True):
            assert helpers.relative_error(got, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_equal_naive(dtype):
    with helpers.strict_types():
        rng = np.random.default_rng(2)
        slots, token_of_row = routing()
        x = jnp.asarray(helpers.values_of_many_magnitudes(rng, TOKENS, WIDTH), dtype)
        drows = jnp.asarray(helpers.values_of_many_magnitudes(rng, ROWS, WIDTH), dtype)
        rows, dx = rows_and_gradient(x, token_of_row, slots, drows)
        expected_rows, expected_dx = np.zeros((ROWS, WIDTH)), np.zeros((TOKENS, WIDTH))
        for r, t in enumerate(np.asarray(token_of_row)):
            if t < TOKENS:
                expected_rows[r] = np.asarray(x, np.float64)[t]
                expected_dx[t] += np.asarray(drows, np.float64)[r]
        assert rows.dtype == dx.dtype == dtype
        assert np.array_equal(np.asarray(rows, np.float64), expected_rows)
        assert helpers.relative_error(dx, expected_dx) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_and_sum_are_each_other_s_gradient(dtype):
    with helpers.strict_types():
        rng = np.random.default_rng(2)
        slots, token_of_row = routing()
        x = jnp.asarray(helpers.values_of_many_magnitudes(rng, TOKENS, WIDTH), dtype)
        rows = jnp.asarray(helpers.values_of_many_magnitudes(rng, ROWS, WIDTH), dtype)
        gathered = rows_and_gradient(x, token_of_row, slots, rows)
        added = sum_and_gradient(rows, token_of_row, slots, x)
        assert helpers.same_bits(added, gathered[::-1])


def test_sums_run_in_the_order_of_the_selections():
    """1e8 + 1 - 1e8 in float32 is 0 from left to right, 1 in other orders."""
    values = jnp.asarray([[1.0], [-1e8], [1e8]])
    slots = jnp.asarray([[2, 0, 1], [2, 1, 0]])
    out = jax.jit(gather_combine)(values, slots, jnp.ones((2, 3)))
    assert np.asarray(out).tolist() == [[0.0], [1.0]]


def test_two_runs_give_the_same_bits():
    args = combine_operands("float32")
    assert helpers.same_bits(combine_and_gradients(*args), combine_and_gradients(*args))


def test_no_float_scatter():
    args = combine_operands("float32")
    assert not helpers.float_scatters(combine_and_gradients, *args)
    slots, token_of_row = routing()
    rows_args = (jnp.ones((TOKENS, WIDTH)), token_of_row, slots, jnp.ones((ROWS, WIDTH)))
    assert not helpers.float_scatters(rows_and_gradient, *rows_args)
    sum_args = (rows_args[3], token_of_row, slots, rows_args[0])
    assert not helpers.float_scatters(sum_and_gradient, *sum_args)


def test_the_search_finds_a_float_scatter():
    scattered = helpers.float_scatters(lambda x: jnp.zeros(5).at[jnp.arange(2)].add(x), jnp.ones(2))
    assert scattered


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weights=jnp.zeros((2, 4))), "slots_TK is"),
        (dict(slots=jnp.zeros((2, 3))), "expected an integer dtype"),
        (dict(values=jnp.zeros(5)), "expected 2 dimensions"),
        (dict(implementation="cudnn"), "choose None or one of 'reference'"),
    ],
)
def test_combine_refuses(change, message):
    args = dict(values=jnp.zeros((6, 5)), slots=jnp.zeros((2, 3), int), weights=jnp.zeros((2, 3)))
    args |= dict(implementation=None) | change
    with pytest.raises(ValueError, match=message):
        gather_combine(
            args["values"],
            args["slots"],
            args["weights"],
            implementation=args["implementation"],
        )


def test_rows_refuses_slots_of_other_tokens():
    with pytest.raises(ValueError, match="slots_TK has 3 tokens, x_TD 4"):
        gather_rows(jnp.zeros((4, 5)), jnp.zeros(6, int), jnp.zeros((3, 2), int))


def test_sum_refuses_another_number_of_rows():
    with pytest.raises(ValueError, match="token_of_row_R has 6 rows, values_RD 4"):
        gather_sum(jnp.zeros((4, 5)), jnp.zeros(6, int), jnp.zeros((3, 2), int))


@pytest.mark.parametrize("dtype, rows, outside", helpers.INDEX_DTYPES)
def test_indices_of_every_integer_dtype(dtype, rows, outside):
    rng = np.random.default_rng(7)
    slots = np.asarray([[5, 100], [outside or 1, 0], [99, outside or 7]], object)
    token_of_row = np.full(rows, 2 if outside is None else outside, object)
    for (t, _), slot in np.ndenumerate(slots):
        if slot != outside:
            token_of_row[slot] = t
    x, drows, weights = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32)
        for shape in ((3, 2), (rows, 2), (3, 2))
    )

    def run(slots, token_of_row):
        combined = combine_and_gradients(drows, slots, weights, x)
        added = sum_and_gradient(drows, token_of_row, slots, x)
        return *combined, *added, *rows_and_gradient(x, token_of_row, slots, drows)

    def cast(index, dtype):
        return jnp.asarray(index.astype(dtype))

    with helpers.strict_types():
        known = (np.where(index == outside, -1, index) for index in (slots, token_of_row))
        expected = run(*(cast(index, np.int32) for index in known))
        actual = run(cast(slots, dtype), cast(token_of_row, dtype))
        assert helpers.same_bits(actual, expected)


@pytest.mark.parametrize(
    "tokens, selected, rows, width", [(3, 2, 0, 4), (0, 2, 5, 4), (3, 0, 5, 4), (3, 2, 5, 0)]
)
def test_empty_operands(tokens, selected, rows, width):
    slots = jnp.full((tokens, selected), rows)
    values, weights = jnp.ones((rows, width)), jnp.ones((tokens, selected))
    out, dvalues, dweights = combine_and_gradients(
        values, slots, weights, jnp.ones((tokens, width))
    )
    assert out.shape == (tokens, width) and dvalues.shape == values.shape
    assert dweights.shape == weights.shape
    x, token_of_row = jnp.ones((tokens, width)), jnp.full(rows, tokens)
    routed, dx = rows_and_gradient(x, token_of_row, slots, values)
    added, dadded = sum_and_gradient(values, token_of_row, slots, x)
    assert routed.shape == dadded.shape == values.shape and dx.shape == added.shape == x.shape
    assert not any(np.any(a) for a in (out, dvalues, dweights, routed, dx, added, dadded))


@pytest.mark.parametrize("tokens, rows", [(3, 0), (0, 5)])
def test_empty_operands_launch_no_kernel(tokens, rows):
    x, slots = jnp.ones((tokens, 128), jnp.bfloat16), jnp.full((tokens, 1), rows)
    routed = gather_rows(x, jnp.full(rows, tokens), slots, implementation="mosaic")
    assert routed.shape == (rows, 128) and not np.any(routed)
