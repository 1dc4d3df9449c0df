"""Losses against plain float64 log-softmax and hand-made numbers; padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.losses import (
    cross_entropy,
    denominators,
    hidden_z_sum,
    loss_terms,
    online_log_sum_exp,
    sequence_of,
    target_masks,
    total_loss,
)
from longcat_jax.model.longcat import mtp_hidden, trunk, unembed
from tests.helpers import exact, random_batch, random_params, relative_error, tiny_config, trained

R, D, W = 29, 24, 44


@pytest.fixture(autouse=True)
def _exact():
    with exact():
        yield


@pytest.fixture(scope="module")
def job():
    with exact():
        config = tiny_config()
        return config, random_params(config), random_batch(config)


def _plain(hidden, head, targets):
    logp = jax.nn.log_softmax(hidden @ head, axis=-1)
    return -jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]


# 44 columns: one chunk of all, chunks that divide, that leave a rest, of 1 column, wider than all.
@pytest.mark.parametrize("chunk", [44, 11, 4, 15, 43, 1, 100])
def test_chunked_cross_entropy_and_its_gradients_equal_plain_log_softmax(chunk):
    rng = np.random.default_rng(chunk)
    hidden, head = jnp.asarray(rng.normal(size=(R, D))), jnp.asarray(rng.normal(size=(D, W)))
    # All columns are targets of some row, those at the chunks' edges too.
    targets, mix = jnp.arange(R) * 3 % W, jnp.asarray(rng.normal(size=R))

    @jax.jit
    def both(hidden, head):
        ours = jax.vjp(lambda h, w: cross_entropy(h, w, targets, chunk), hidden, head)
        plain = jax.vjp(lambda h, w: _plain(h, w, targets), hidden, head)
        return (ours[0], ours[1](mix)), (plain[0], plain[1](mix))

    assert relative_error(*both(hidden, head)) <= 1e-13


@pytest.mark.parametrize("width", [44, 43, 1])
def test_log_sum_exp_of_a_gpu_equals_that_of_a_cpu(width):
    rows = np.random.default_rng(width).normal(size=(R, width)) * np.logspace(-3, 5, R)[:, None]
    rows[3:6] = [[-1e30], [1e30], [np.nan]]  # all the same, far out
    rows[6, 0] = -np.inf
    rows_RW = jnp.asarray(rows)
    expected = jax.nn.logsumexp(rows_RW, axis=1)
    np.testing.assert_allclose(online_log_sum_exp(rows_RW), expected, rtol=1e-14, atol=1e-14)


def test_cross_entropy_survives_logits_far_from_zero():
    hidden = jnp.asarray([[1000.0, 1.0], [-1000.0, 1.0]])
    head = jnp.asarray([[1.0, 0.5, -1.0], [0.0, 0.0, 0.0]])
    loss = cross_entropy(hidden, head, jnp.asarray([0, 0]), 2)
    np.testing.assert_allclose(loss, [0, 2000], rtol=1e-12)


def test_cross_entropy_of_bfloat16_hidden_is_float32_and_close():
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(R, D)), 0.3 * rng.normal(size=(D, W))
    low = jnp.asarray(hidden, jnp.bfloat16)
    targets = jnp.arange(R) % W
    loss = cross_entropy(low, jnp.asarray(head, jnp.float32), targets, 15)
    assert loss.dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float64)
    wanted = _plain(jnp.asarray(low, jnp.float64), rounded, targets)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_targets_stop_at_segment_ends_and_padding():
    ids = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    has_next, has_second = target_masks({"segment_ids": jnp.asarray(ids)})
    np.testing.assert_array_equal(has_next[0], [True, True, False, True, False, False, False])
    np.testing.assert_array_equal(has_second[0], [True] + [False] * 6)
    np.testing.assert_array_equal(has_next[1], [True] * 7)
    np.testing.assert_array_equal(has_second[1], [True] * 6 + [False])


def test_denominators_count_targets_tokens_and_rows():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    totals = denominators({"segment_ids": ids}, tiny_config())
    counts = totals.targets, totals.mtp_targets, totals.tokens, totals.rows
    assert [float(count) for count in counts] == [10, 7, 13, 2]
    assert totals.targets.dtype == jnp.float64
    empty = denominators({"segment_ids": jnp.zeros((2, 8), jnp.int32)}, tiny_config())
    assert float(empty.targets) == float(empty.tokens) == 1, "nothing is divided by 0"


def test_hidden_z_loss_of_a_hand_computed_case():
    last = jnp.asarray([[[np.log(2.0), -np.log(3.0)], [-1.0, 1.0]], [[0.0, 0.0], [9.0, 9.0]]])
    valid = jnp.asarray([[True, True], [True, False]])
    # log(2 + 3), log(2 e) and log 2; the last token is padding.
    wanted = np.log(5) ** 2 + (1 + np.log(2)) ** 2 + np.log(2) ** 2
    np.testing.assert_allclose(hidden_z_sum(last, valid), wanted, rtol=1e-14)


def test_total_is_the_sum_with_the_mtp_weight_and_terms_carry_theirs(job):
    config, params, batch = job
    some = {name: x[:3] for name, x in batch.items()}
    totals = denominators(some, config)
    free = dataclasses.replace(
        config,
        optim=dataclasses.replace(
            config.optim,
            z_weight=1.0,
            balance=dataclasses.replace(config.optim.balance, alpha=1.0),
        ),
    )
    terms, bare = jax.jit(
        lambda p: (loss_terms(p, config, some, totals)[0], loss_terms(p, free, some, totals)[0])
    )(params)
    weighted = 0.4 * terms.mtp_loss + 0.2 * bare.balance_loss + 1e-2 * bare.z_loss
    np.testing.assert_allclose(total_loss(terms, config), terms.loss + weighted, rtol=1e-13)
    # An untrained model with logits of this size is off uniform, but not by far.
    for loss in (terms.loss, terms.mtp_loss):
        assert 0.5 * np.log(W) < float(loss) < 3 * np.log(W)
    # Summed over layers, mean over rows: 2 layers near 1 each.
    assert 1.0 < float(bare.balance_loss) < 4.0


def test_what_stands_in_padding_changes_no_loss_no_gradient_and_no_count(job):
    _, _, batch = job
    rng = np.random.default_rng(8)
    padding = batch["segment_ids"] == 0
    tokens = np.where(padding, rng.integers(1, W, padding.shape), batch["tokens"])
    assert (tokens != batch["tokens"]).sum() > 20
    positions = np.where(padding, 7, batch["positions"])
    other = {**batch, "tokens": tokens.astype(np.int32), "positions": positions.astype(np.int32)}
    state, metrics = trained().run(other)
    # Sums over tokens run in another order where expert rows moved.
    assert relative_error(metrics, trained().losses[0]) <= 1e-12
    assert relative_error(jax.device_get(state), trained().states[0]) <= 1e-11


def test_losses_equal_a_plain_computation_from_logits(job):
    config, params, batch = job
    sequence = sequence_of(batch)

    @jax.jit
    def logits_of(params):
        out = trunk(params, config.model, sequence)
        mtp = mtp_hidden(params, config.model, out.hidden_BTD, batch["tokens"][:, 1:], sequence)
        return unembed(params, out.hidden_BTD), unembed(params, mtp), out.last_BTD

    logits, mtp_logits, last = jax.device_get(logits_of(params))
    ids, tokens = batch["segment_ids"], batch["tokens"]

    def mean_nats(logits, distance):
        total, count = 0.0, 0
        for b, t in np.ndindex(len(ids), logits.shape[1]):
            reached = ids[b, t : t + distance + 1]
            if len(reached) == distance + 1 and reached[0] != 0 and (reached == reached[0]).all():
                row = logits[b, t]
                total += np.log(np.exp(row).sum()) - row[tokens[b, t + distance]]
                count += 1
        return total / count

    terms = trained().losses[0]
    assert terms["loss"] == pytest.approx(mean_nats(logits, 1), rel=1e-12)
    assert terms["mtp_loss"] == pytest.approx(mean_nats(mtp_logits, 2), rel=1e-12)
    squares = np.log(np.exp(np.abs(last)).sum(-1)) ** 2
    z_loss = 1e-2 * squares[ids[:, :-1] != 0].mean()
    assert terms["z_loss"] == pytest.approx(z_loss, rel=1e-12)
