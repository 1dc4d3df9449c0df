import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import scatter_add
from pallas_kernels.scatter_add import schedule
from tests.kernels import helpers

ROWS, WIDTH, DESTINATIONS = 300, 24, 70
TOLERANCE = {"bfloat16": 1e-6, "float32": 1e-6, "float64": 1e-14}


def ids_of(case):
    rng = np.random.default_rng(3)
    ids = rng.integers(0, DESTINATIONS, ROWS)
    if case == "half on one":
        ids[rng.permutation(ROWS)[: ROWS // 2]] = 11
    if case == "all on the last":
        ids[:] = DESTINATIONS - 1
    if case == "some dropped":
        ids[::7], ids[::11] = -1, DESTINATIONS
    return ids


CASES = ("uniform", "half on one", "all on the last", "some dropped")


@jax.jit
def sum_and_gradient(values, ids, dout):
    out, vjp = jax.vjp(lambda v: scatter_add(v, ids, DESTINATIONS), values)
    return out, *vjp(dout)


def operands(case, dtype):
    rng = np.random.default_rng(4)
    values = jnp.asarray(helpers.values_of_many_magnitudes(rng, ROWS, WIDTH), dtype)
    dout = helpers.values_of_many_magnitudes(rng, DESTINATIONS, WIDTH)
    dout = jnp.asarray(dout, np.promote_types(jnp.dtype(dtype), np.float32))
    return values, jnp.asarray(ids_of(case), jnp.int32), dout


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_naive(case, dtype):
    with helpers.strict_types():
        values, ids, dout = operands(case, dtype)
        out, dvalues = sum_and_gradient(values, ids, dout)
        expected, expected_gradient = np.zeros((DESTINATIONS, WIDTH)), np.zeros((ROWS, WIDTH))
        for r, n in enumerate(np.asarray(ids)):
            if 0 <= n < DESTINATIONS:
                expected[n] += np.asarray(values[r], np.float64)
                expected_gradient[r] = np.asarray(dout, np.float64)[n]
        assert out.dtype == dout.dtype and dvalues.dtype == dtype
        assert helpers.relative_error(out, expected) <= TOLERANCE[dtype]
        gradient_tolerance = 4e-3 if dtype == "bfloat16" else 0
        assert helpers.relative_error(dvalues, expected_gradient) <= gradient_tolerance


def test_unused_destinations_are_zero():
    out = scatter_add(jnp.ones((3, 2)), jnp.asarray([4, 1, 4]), 6)
    assert np.asarray(out[:, 0]).tolist() == [0, 1, 0, 0, 2, 0]


def test_a_nan_stays_in_its_destination():
    values = jnp.ones((4, 2)).at[1].set(jnp.nan)
    out = scatter_add(values, jnp.asarray([0, 2, 3, 3]), 5)
    assert np.isnan(out[2]).all() and np.isfinite(out[jnp.asarray([0, 1, 3, 4])]).all()


@pytest.mark.parametrize("rows, width", [(0, 3), (5, 0)])
def test_nothing_to_add(rows, width):
    values, ids = jnp.zeros((rows, width), jnp.bfloat16), jnp.zeros(rows, int)
    out, vjp = jax.vjp(lambda v: scatter_add(v, ids, 4), values)
    assert out.shape == (4, width) and out.dtype == jnp.float32 and not np.any(out)
    assert vjp(out)[0].shape == (rows, width)


@pytest.mark.parametrize("dtype, destinations, outside", helpers.INDEX_DTYPES)
def test_ids_of_every_integer_dtype(dtype, destinations, outside):
    ids = np.asarray([3, outside or 0, 7, 3, 100, outside or 0], object)
    values = jnp.asarray(np.random.default_rng(8).standard_normal((6, 2)), jnp.float32)
    dout = jnp.asarray(np.random.default_rng(9).standard_normal((destinations, 2)), jnp.float32)

    def run(ids):
        out, vjp = jax.vjp(lambda v: scatter_add(v, ids, destinations), values)
        return out, *vjp(dout)

    with helpers.strict_types():
        expected = run(jnp.asarray(np.where(ids == outside, -1, ids).astype(np.int32)))
        assert helpers.same_bits(run(jnp.asarray(ids.astype(dtype))), expected)


@pytest.mark.parametrize("rows, destinations", [(300, 70), (9001, 31)])
@pytest.mark.parametrize("counters", [0, schedule.MAX_COUNTERS], ids=["sorting", "counting"])
def test_plan_is_the_stable_order(monkeypatch, counters, rows, destinations):
    monkeypatch.setattr(schedule, "MAX_COUNTERS", counters)
    ids = np.random.default_rng(6).integers(-2, destinations + 3, rows)
    ids[::3] = 5
    ids[(ids < 0) | (ids >= destinations)] = destinations
    row, id_of_row, start = schedule.plan(jnp.asarray(ids, jnp.int32), destinations)
    order = np.argsort(ids, kind="stable")
    kept = int((ids < destinations).sum())
    assert np.array_equal(np.asarray(row)[:kept], order[:kept])
    assert np.array_equal(id_of_row, ids[order])
    assert np.array_equal(start, np.searchsorted(ids[order], np.arange(destinations + 1)))


def test_two_runs_give_the_same_bits():
    args = operands("half on one", "float32")
    assert helpers.same_bits(sum_and_gradient(*args), sum_and_gradient(*args))


def test_no_float_scatter():
    assert not helpers.float_scatters(sum_and_gradient, *operands("uniform", "float32"))


@pytest.mark.parametrize(
    "values, ids, num_rows, message",
    [
        (jnp.zeros((3, 2)), jnp.zeros(4, int), 5, "3 rows, ids_R 4"),
        (jnp.zeros((3, 2)), jnp.zeros(3), 5, "expected an integer dtype"),
        (jnp.zeros((3, 2), int), jnp.zeros(3, int), 5, "expected a floating dtype"),
        (jnp.zeros((3, 2)), jnp.zeros(3, int), 0, "num_rows is 0"),
    ],
)
def test_refuses(values, ids, num_rows, message):
    with pytest.raises(ValueError, match=message):
        scatter_add(values, ids, num_rows)


def test_refuses_an_unknown_implementation():
    with pytest.raises(ValueError, match="choose None or one of 'reference'"):
        scatter_add(jnp.zeros((3, 2)), jnp.zeros(3, int), 5, implementation="atomics")
