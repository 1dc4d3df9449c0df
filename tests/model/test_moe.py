"""Real and identity experts against a loop over tokens, and variance compensation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.model import experts as model_experts
from longcat_jax.model.experts import FEW_SLOTS, permute_by_expert, real_experts
from longcat_jax.model.moe import MoE
from tests.helpers import exact, random_params, relative_error, tiny_config

CONFIG = tiny_config().model
N, E, K, GAMMA = 8, 17, 4, 1.7


@pytest.fixture(autouse=True)
def _exact():
    with exact():
        yield


@pytest.fixture(scope="module")
def layer():
    """Weights of one MoE and an input [2, 13, 24]."""
    with exact():
        params = random_params(tiny_config())["layers"]["mlp"]
        x = np.random.default_rng(4).normal(size=(2, 13, 24))
        return jax.tree.map(lambda w: jnp.asarray(w[0]), params), jnp.asarray(x)


def _silu(x):
    return x / (1 + np.exp(-x))


def _loop(x, weights, gamma=GAMMA):
    """SPEC's formula token by token: gamma * sum of p_i E_i(x)."""
    x, weights = jax.tree.map(np.asarray, (x, weights))
    logits = x @ weights["router"]["classifier"]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    choice = np.argsort(-(p + weights["router"]["e_score_correction_bias"]), kind="stable")
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        for i in choice[place][:K]:
            y = x[place]
            if i < N:
                gate, up = np.split(y @ weights["experts"]["gate_up_proj"][i], 2)
                y = (_silu(gate) * up) @ weights["experts"]["down_proj"][i]
            out[place] += gamma * p[place][i] * y
    return out


def test_moe_equals_a_loop_over_tokens_and_experts(layer):
    weights, x = layer
    out, routing, _ = jax.jit(lambda w, x: MoE(CONFIG).apply({"params": w}, x))(weights, x)
    kinds = np.asarray(routing.experts_BTK) >= N
    assert kinds.any() and not kinds.all()
    assert relative_error(out, _loop(x, weights)) <= 1e-13


def test_gate_half_of_gate_up_comes_first(layer):
    weights, x = layer
    halves = jnp.roll(weights["experts"]["gate_up_proj"], 10, axis=-1)
    swapped = {**weights, "experts": {**weights["experts"], "gate_up_proj": halves}}
    out, _, _ = jax.jit(lambda w, x: MoE(CONFIG).apply({"params": w}, x))(swapped, x)
    assert relative_error(out, _loop(x, weights)) > 1e-2


def test_identity_selections_give_gamma_sum_p_x_and_no_row_of_work(layer, monkeypatch):
    weights, x = layer
    bias = np.where(np.arange(E) >= N, 10.0, 0.0)
    weights = {**weights, "router": {**weights["router"], "e_score_correction_bias": bias}}
    sizes = []

    def watched(lhs, rhs, group_sizes):
        sizes.append(np.asarray(group_sizes))
        return grouped_gemm(lhs, rhs, group_sizes)

    grouped_gemm = model_experts.grouped_gemm
    monkeypatch.setattr(model_experts, "grouped_gemm", watched)
    out, routing, left_out = MoE(CONFIG).apply({"params": weights}, jnp.asarray(x))
    assert (np.asarray(routing.experts_BTK) >= N).all()
    p = np.take_along_axis(np.asarray(routing.p_BTE), np.asarray(routing.experts_BTK), axis=-1)
    assert relative_error(out, GAMMA * p.sum(-1, keepdims=True) * np.asarray(x)) <= 1e-14
    assert left_out == 0
    assert len(sizes) == 2
    for size in sizes:
        np.testing.assert_array_equal(size, np.zeros(N))


def test_gamma_multiplies_real_and_identity_experts_alike(layer):
    weights, x = layer
    double = dataclasses.replace(CONFIG, routed_scaling_factor=2 * GAMMA)
    one, _, _ = jax.jit(lambda w, x: MoE(CONFIG).apply({"params": w}, x))(weights, x)
    two, routing, _ = jax.jit(lambda w, x: MoE(double).apply({"params": w}, x))(weights, x)
    assert (np.asarray(routing.experts_BTK) >= N).any()
    assert relative_error(two, 2 * np.asarray(one)) <= 1e-14


TOKENS = (29, 400)
"""Slots that are compared, and sorted."""


@pytest.mark.parametrize("tokens", TOKENS)
def test_permutation_sorts_rows_by_expert_and_gives_identity_slots_none(tokens):
    experts, slots = np.random.default_rng(0).integers(0, E, (tokens, K)), tokens * K
    assert (slots > FEW_SLOTS) == (tokens == TOKENS[1])
    order = permute_by_expert(jnp.asarray(experts, jnp.int32), N, slots)
    flat = experts.reshape(-1)
    np.testing.assert_array_equal(order.group_sizes_X, np.bincount(flat, minlength=E)[:N])
    used = np.count_nonzero(flat < N)
    slot_of_row = np.argsort(np.minimum(flat, N), kind="stable")[:used]
    wanted = np.full(slots, slots)
    wanted[:used] = slot_of_row
    np.testing.assert_array_equal(order.slot_of_row_R, wanted)
    wanted = np.full(slots, slots)
    wanted[slot_of_row] = range(used)
    np.testing.assert_array_equal(order.row_of_slot_TK, wanted.reshape(tokens, K))


@pytest.mark.parametrize("tokens", TOKENS)
def test_permutation_with_too_few_rows_keeps_the_first_slots(tokens):
    experts = np.random.default_rng(0).integers(0, E, (tokens, K)).astype(np.int32)
    kept = np.cumsum(experts.reshape(-1) < N).reshape(tokens, K) <= 23
    order = permute_by_expert(jnp.asarray(experts), N, 23)
    alone = permute_by_expert(jnp.asarray(np.where(kept, experts, N)), N, tokens * K)
    assert order.group_sizes_X.sum() == 23
    np.testing.assert_array_equal(order.group_sizes_X, alone.group_sizes_X)
    np.testing.assert_array_equal(order.slot_of_row_R, alone.slot_of_row_R[:23])
    np.testing.assert_array_equal(order.row_of_slot_TK, np.minimum(alone.row_of_slot_TK, 23))


def test_gradients_of_real_experts_equal_those_of_a_dense_mixture():
    rng = np.random.default_rng(7)
    T, D, X, F = 29, 24, N, 10
    experts = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    x, gates = rng.normal(size=(T, D)), rng.uniform(size=(T, K))
    gate_up, down = rng.normal(size=(X, D, 2 * F)), rng.normal(size=(X, F, D))
    mix = rng.normal(size=(T, D))

    def ours(x, gates, gate_up, down):
        return (real_experts(x, gates, experts, gate_up, down) * mix).sum()

    def dense(x, gates, gate_up, down):
        gate, up = jnp.split(jnp.einsum("td,xdf->txf", x, gate_up), 2, axis=-1)
        all_experts = jnp.einsum("txf,xfd->txd", jax.nn.silu(gate) * up, down)
        weight = (jax.nn.one_hot(experts, X, dtype=x.dtype) * gates[..., None]).sum(1)
        return (jnp.einsum("tx,txd->td", weight, all_experts) * mix).sum()

    arguments = x, gates, gate_up, down
    wanted = jax.jit(jax.value_and_grad(dense, argnums=(0, 1, 2, 3)))(*arguments)
    actual = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2, 3)))(*arguments)
    assert relative_error(actual, wanted) <= 1e-12


@pytest.mark.parametrize("parts", [2, 4])
def test_gamma_m_restores_the_variance_of_experts_split_into_m_parts(parts):
    """SPEC 6: m times smaller gates and m times narrower experts, so gamma = m."""
    rng = np.random.default_rng(parts)
    T, D, X, F, chosen = 512, 32, 8, 64, 3

    def variance(split):
        experts, width, selections = X * split, F // split, chosen * split
        logits = 0.02 * rng.normal(size=(T, experts))
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        ids = np.argsort(-logits, axis=-1)[:, :selections].astype(np.int32)
        gate_up = 0.1 * rng.normal(size=(experts, D, 2 * width))
        down = 0.1 * rng.normal(size=(experts, width, D))
        gates = np.take_along_axis(p, ids, axis=-1)
        return np.var(jax.jit(real_experts)(x, gates, ids, gate_up, down))

    x = rng.normal(size=(T, D))
    ratio = variance(parts) / variance(1)
    gamma = parts
    assert abs(gamma**2 * ratio - 1) < 0.15
