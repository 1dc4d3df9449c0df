"""Filters keep the right sets, draws have the right frequencies, keys depend on seed and place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.inference.sampling import choose, keep_likely, make_sampling, row_keys

W = 23

keep = jax.jit(keep_likely)
select = jax.jit(choose)


def expected_set(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """By definition, one token after the other from the likeliest on."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k]
    weights = np.exp(logits[order].astype(np.float64))
    kept, mass = set(), 0.0
    for token, share in zip(order, weights / weights.sum(), strict=True):
        if mass >= top_p:
            break
        kept.add(token)
        mass += share
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (5, 1.0), (W, 0.7), (W, 1e-6), (8, 0.45), (W + 9, 0.999), (W, 1)]
)
def test_filters_keep_the_sets_of_the_definition(top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (6, W)).astype(np.float32)
    logits[4] = np.round(logits[4])  # ties
    out = np.asarray(keep(jnp.asarray(logits), top_k=top_k, top_p=top_p))
    for row, before in zip(out, logits, strict=True):
        kept = set(np.flatnonzero(np.isfinite(row)).tolist())
        assert kept == expected_set(before, top_k, top_p)
        ids = sorted(kept)
        np.testing.assert_array_equal(row[ids], before[ids])


def test_of_equal_logits_the_lower_ids_stay() -> None:
    logits = jnp.array([[0.0, 2.0, 1.0, 1.0, 1.0, -1.0]])
    out = keep(logits, top_k=3, top_p=1.0)
    np.testing.assert_array_equal(np.isfinite(out[0]), [False, True, True, True, False, False])
    equal = keep(jnp.zeros((2, 10)), top_k=10, top_p=0.35)
    np.testing.assert_array_equal(np.isfinite(equal).sum(-1), [4, 4])
    assert np.isfinite(equal[:, :4]).all()
    greedy = make_sampling(temperature=0, top_k=0, top_p=1, vocab_size=6)
    assert select(jnp.ones((2, 6)), row_keys(jnp.arange(2), jnp.arange(2)), greedy).tolist() == [
        0,
        0,
    ]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(0.6, 0, 1.0), (1.5, 3, 0.9)])
def test_draws_have_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    draws = 20_000
    logits = np.array([0.3, 1.1, -0.4, 0.9, -2.0], np.float32)
    sampling = make_sampling(temperature=temperature, top_k=top_k, top_p=top_p, vocab_size=5)
    keys = row_keys(jnp.full(draws, 3), jnp.arange(draws))
    tokens = select(jnp.tile(logits, (draws, 1)), keys, sampling)
    kept = sorted(expected_set(logits / temperature, top_k or 5, top_p))
    share = np.zeros(5)
    share[kept] = np.exp(logits[kept] / temperature)
    share /= share.sum()
    counts = np.bincount(tokens, minlength=5)
    assert counts[share == 0].sum() == 0
    deviation = np.abs(counts / draws - share) / np.sqrt(share * (1 - share) / draws + 1e-12)
    assert deviation.max() < 4
    assert len(kept) == (3 if top_k else 5)


def test_a_tiny_temperature_is_greedy() -> None:
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 50, (4, W)), jnp.float32)
    sampling = make_sampling(temperature=1e-37, top_k=0, top_p=1, vocab_size=W)
    tokens = select(logits, row_keys(jnp.arange(4), jnp.arange(4)), sampling)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_keys_depend_on_seed_and_position_only() -> None:
    data = jax.random.key_data(row_keys(jnp.array([7, 7, 8, 7]), jnp.array([2, 3, 2, 2])))
    np.testing.assert_array_equal(data[0], data[3])
    assert len({tuple(row) for row in data.tolist()}) == 3


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, "temperature=-0.1: must be a finite number >= 0"),
        ("temperature", float("nan"), "temperature=nan: must be a finite number >= 0"),
        ("temperature", "hot", "temperature='hot': must be a finite number >= 0"),
        ("top_k", -1, "top_k=-1: must be an integer >= 0"),
        ("top_k", 2.0, "top_k=2.0: must be an integer >= 0"),
        ("top_p", 0.0, "top_p=0.0: must be above 0 and at most 1"),
        ("top_p", 1.01, "top_p=1.01: must be above 0 and at most 1"),
        ("top_p", True, "top_p=True: must be above 0 and at most 1"),
    ],
)
def test_bad_settings_are_one_line(field: str, value: object, message: str) -> None:
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "vocab_size": W, field: value}
    with pytest.raises(ValueError) as caught:
        make_sampling(**settings)
    assert str(caught.value) == message
