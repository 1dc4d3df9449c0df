"""Router: selection, gates, counts, balance loss; against small numpy computations in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.model.router import (
    PARTS,
    Router,
    Routing,
    balance_loss,
    largest_by_comparison,
    largest_one_by_one,
    product_parts,
    router_statistics,
    select,
    wide_product,
)
from tests.helpers import SIZES, exact, relative_error, tiny_config

ROWS, TOKENS = 2, 13
CONFIG = tiny_config().model
N, E, K, D = SIZES["n_routed_experts"], CONFIG.num_router_outputs, SIZES["moe_topk"], 24
GAMMA = SIZES["routed_scaling_factor"]


@pytest.fixture(autouse=True)
def _exact():
    with exact():
        yield


def _weights(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, TOKENS, D))
    classifier = 0.4 * rng.normal(size=(D, E))
    return x, {"classifier": classifier, "e_score_correction_bias": 0.1 * rng.normal(size=E)}


def _route(x, weights, config=CONFIG, **inputs):
    return Router(config).apply({"params": weights}, jnp.asarray(x), **inputs)


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_parts_made_once_give_the_product_that_is_made_of_the_weights():
    """In bfloat16, where a router's product takes three parts of its float32 weights."""
    x, weights = _weights()
    weights = {name: jnp.asarray(w, jnp.float32) for name, w in weights.items()}
    config, x = dataclasses.replace(CONFIG, dtype="bfloat16"), jnp.asarray(x, jnp.bfloat16)
    wanted = _route(x, weights, config)
    got = _route(x, {**weights, PARTS: product_parts(weights["classifier"])}, config)
    assert wanted.p_BTE.dtype == got.p_BTE.dtype == jnp.float32
    np.testing.assert_allclose(got.p_BTE, wanted.p_BTE, rtol=1e-5)
    np.testing.assert_array_equal(got.experts_BTK, wanted.experts_BTK)


def test_gates_are_gamma_times_the_unbiased_p_of_the_top_k_of_p_plus_bias():
    x, weights = _weights()
    routing = _route(x, weights)
    p = _softmax(x @ weights["classifier"])
    wanted = np.argsort(-(p + weights["e_score_correction_bias"]), axis=-1, kind="stable")[..., :K]
    np.testing.assert_array_equal(routing.experts_BTK, wanted)
    gates = GAMMA * np.take_along_axis(p, wanted, axis=-1)
    np.testing.assert_allclose(routing.gates_BTK, gates, rtol=1e-13)
    # Not renormalised: the gates' sum is gamma times what the selected have of p.
    assert (np.abs(routing.gates_BTK.sum(-1) - GAMMA) > 0.1).all()


def test_bias_changes_the_selection_but_neither_p_nor_a_selected_expert_s_gate():
    x, weights = _weights()
    plain = _route(x, {**weights, "e_score_correction_bias": np.zeros(E)})
    moved = _route(x, weights)
    np.testing.assert_array_equal(plain.p_BTE, moved.p_BTE)
    assert (np.sort(plain.experts_BTK) != np.sort(moved.experts_BTK)).any()
    picked = np.take_along_axis(np.asarray(plain.p_BTE), np.asarray(moved.experts_BTK), axis=-1)
    np.testing.assert_array_equal(moved.gates_BTK, GAMMA * picked)


def test_bias_has_zero_gradient_and_the_classifier_has_not():
    x, weights = _weights()
    mix = np.random.default_rng(1).normal(size=(ROWS, TOKENS, K))
    grads = jax.grad(lambda w: (_route(x, w).gates_BTK * mix).sum())(
        jax.tree.map(jnp.asarray, weights)
    )
    assert (np.asarray(grads["e_score_correction_bias"]) == 0).all()
    assert (np.asarray(grads["classifier"]) != 0).any()


def test_ties_go_to_the_lowest_index():
    x, weights = _weights()
    zeros = {name: np.zeros_like(w) for name, w in weights.items()}
    np.testing.assert_array_equal(
        _route(x, zeros).experts_BTK, np.broadcast_to(np.arange(K), (ROWS, TOKENS, K))
    )
    zeros["e_score_correction_bias"][[16, 11, 3]] = 0.5
    wanted = np.broadcast_to([3, 11, 16, 0], (ROWS, TOKENS, K))
    np.testing.assert_array_equal(_route(x, zeros).experts_BTK, wanted)


def test_gradient_of_select_equals_that_of_take_along_axis():
    x, weights = _weights()
    routing = _route(x, weights)
    mix = np.random.default_rng(1).normal(size=(ROWS, TOKENS, K))
    ours = jax.grad(lambda p: (select(p, routing.experts_BTK) * mix).sum())(routing.p_BTE)
    plain = jax.grad(lambda p: (jnp.take_along_axis(p, routing.experts_BTK, axis=-1) * mix).sum())(
        routing.p_BTE
    )
    np.testing.assert_allclose(ours, plain, rtol=1e-14)


def test_router_of_a_bfloat16_model_computes_in_float32():
    x, weights = _weights()
    low = dataclasses.replace(CONFIG, dtype="bfloat16")
    x_low = jnp.asarray(x, jnp.bfloat16)
    routing = _route(x_low, jax.tree.map(np.float32, weights), low)
    assert routing.p_BTE.dtype == routing.gates_BTK.dtype == jnp.float32
    wanted = _softmax(np.asarray(x_low, np.float64) @ np.float32(weights["classifier"]))
    np.testing.assert_allclose(routing.p_BTE, wanted, rtol=2e-6)


def test_product_of_bfloat16_and_float32_rounds_neither():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(ROWS, TOKENS, D)), jnp.bfloat16)
    w = jnp.asarray(rng.normal(size=(D, E)) * 2.0 ** rng.integers(-12, 12, (D, E)), jnp.float32)
    dout = jnp.asarray(rng.normal(size=(ROWS, TOKENS, E)), jnp.float32)
    out, vjp = jax.vjp(wide_product, x, w)
    dx, dw = vjp(dout)
    wide = [np.asarray(a, np.float64) for a in (x, w, dout)]
    assert (out.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert relative_error(out, wide[0] @ wide[1]) <= 1e-6
    assert relative_error(dw, np.einsum("btd,bte->de", wide[0], wide[2])) <= 1e-6
    exact_dx = wide[2] @ wide[1].T
    rounding = relative_error(jnp.asarray(exact_dx, jnp.bfloat16), exact_dx)
    assert relative_error(dx, exact_dx) <= 1.05 * rounding


@pytest.mark.parametrize("largest", [largest_one_by_one, largest_by_comparison])
def test_largest_selects_what_top_k_does(largest):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.integers(-4, 4, (ROWS, TOKENS, E)) / 8)  # many ties
    np.testing.assert_array_equal(largest(x, K), jax.lax.top_k(x, K)[1])


@pytest.mark.parametrize("largest", [largest_one_by_one, largest_by_comparison])
def test_largest_takes_no_index_twice(largest):
    x = jnp.full((ROWS, TOKENS, E), -jnp.inf).at[..., 5].set(1.0).at[1, :, 0].set(-2.0)
    np.testing.assert_array_equal(largest(x, K), jax.lax.top_k(x, K)[1])


def test_largest_by_comparison_gives_different_experts_also_for_nan():
    x = jnp.full((1, 2, E), jnp.nan).at[0, 1, 3:].set(0.5)
    np.testing.assert_array_equal(largest_by_comparison(x, K), [[list(range(K))] * 2])


def test_shift_is_added_to_every_p_after_the_softmax():
    x, weights = _weights()
    shift = np.linspace(0, 0.2, E)
    plain, moved = _route(x, weights), _route(x, weights, shift_E=jnp.asarray(shift))
    np.testing.assert_allclose(moved.p_BTE, np.asarray(plain.p_BTE) + shift, rtol=1e-14)


# Balance loss and counts.


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_balance_loss_of_a_balanced_router_is_1_for_every_number_of_groups(groups):
    length, real = 16, CONFIG.moe_topk_real
    p = np.full((3, length, E), 0.0)
    p[..., :N] = real / K / N
    p[..., N:] = (1 - real / K) / (E - N)
    load = np.full((3, E), 0.0)
    load[:, :N] = length * real / N
    load[:, N:] = length * (K - real) / (E - N)
    valid = np.ones((3, length), bool)
    loss = balance_loss(jnp.asarray(p), load, valid, config=CONFIG, groups=groups)
    # sum_j f_j P_j, f = 1 for every group, and the P_j add up to 1.
    np.testing.assert_allclose(loss, 1, rtol=1e-14)


def test_balance_loss_without_identity_experts_is_1_when_balanced():
    model = dataclasses.replace(CONFIG, zero_expert_num=0, moe_topk_real=4.0)
    p, load = np.full((1, 5, N), 1 / N), np.full((1, N), 5 * 4 / N)
    loss = balance_loss(
        jnp.asarray(p), jnp.asarray(load), np.ones((1, 5), bool), config=model, groups=2
    )
    np.testing.assert_allclose(loss, 1, rtol=1e-14)


HAND = dataclasses.replace(
    CONFIG, n_routed_experts=4, zero_expert_num=2, moe_topk=2, moe_topk_real=1.5
)
HAND_EXPERTS = np.array([[[0, 1], [0, 4], [2, 5]]], np.int32)
HAND_P = np.array(
    [[[0.4, 0.3, 0.1, 0.1, 0.05, 0.05], [0.5, 0.1, 0.1, 0.0, 0.2, 0.1], [0.9, 0, 0, 0, 0.1, 0]]]
)


def test_balance_loss_of_a_hand_computed_case_with_padding():
    # Rows of two tokens (the third is padding), G = 2, K_e = 1.5, K = 2.
    # Selections: group 0 has {0, 1, 0} = 3, group 1 none, identity {4} = 1.
    # f = 2 / (1.5 * 2) * [3, 0], identity 1 / (0.5 * 2) * 1.
    # P = [(0.7 + 0.6) / 2, (0.2 + 0.1) / 2], identity (0.1 + 0.3) / 2.
    wanted = 2 * 0.65 + 0 * 0.15 + 1 * 0.2
    valid = jnp.asarray([[True, True, False]])
    routing = Routing(jnp.asarray(HAND_P[..., :2]), jnp.asarray(HAND_EXPERTS), jnp.asarray(HAND_P))
    out = router_statistics(routing, valid, config=HAND, groups=2)
    np.testing.assert_allclose(out.balance_B, [wanted], rtol=1e-14)
    np.testing.assert_array_equal(out.load_E, [2, 1, 0, 0, 1, 0])
    np.testing.assert_array_equal(out.real_histogram, [0, 1, 1])


def test_balance_loss_has_the_gradient_f_over_tokens_and_none_through_the_counts():
    valid = np.array([[True, True, False]])
    load = jnp.asarray([[2.0, 1, 0, 0, 1, 0]])
    grad = jax.grad(lambda p: balance_loss(p, load, valid, config=HAND, groups=2).sum())(
        jnp.asarray(HAND_P)
    )
    f = np.array([2, 2, 0, 0, 1, 1]) / 2
    np.testing.assert_allclose(grad[0], [f, f, 0 * f], rtol=1e-14)


def test_balance_loss_counts_each_row_by_itself():
    rng = np.random.default_rng(0)
    p = jnp.asarray(_softmax(rng.normal(size=(2, 5, E))))
    load = jnp.asarray(rng.integers(0, 9, (2, E)), jnp.int32)
    valid = np.array([[True] * 5, [True] * 3 + [False] * 2])
    both = balance_loss(p, load, valid, config=CONFIG, groups=2)
    for row in (0, 1):
        one = slice(row, row + 1)
        length = valid[row].sum()
        alone = balance_loss(
            p[one, :length], load[one], valid[one, :length], config=CONFIG, groups=2
        )
        np.testing.assert_allclose(both[row], alone[0], rtol=1e-13)
