"""Latent attention: scale corrections, YaRN's softmax scale, expanded against absorbed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.config import RopeScaling
from longcat_jax.model.mla import AttentionInput, LatentCache, absorbed, expanded
from longcat_jax.model.rope import (
    attention_scale,
    rope_frequencies,
    rope_table,
    rotate,
    rotate_last,
)
from tests.helpers import exact, random_params, relative_error, tiny_config

CONFIG = tiny_config().model
ROWS, TOKENS, ENTRIES = 2, 13, 19
H, Q, C, NOPE, ROPE, V, D = 3, 28, 20, 5, 6, 7, 24


@pytest.fixture(autouse=True)
def _exact():
    with exact():
        yield


@pytest.fixture(scope="module")
def attention():
    with exact():
        weights = random_params(tiny_config())["layers"]["self_attn_0"]
        x = np.random.default_rng(3).normal(size=(ROWS, TOKENS, D))
        return jax.tree.map(lambda w: jnp.asarray(w[0]), weights), jnp.asarray(x)


def _tokens(start=0, count=TOKENS):
    positions = jnp.broadcast_to(jnp.arange(start, start + count)[None], (ROWS, count))
    return AttentionInput(rope_table(CONFIG, positions))


def _norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.mla_norm_eps) * weight


def _by_hand(x, w, alpha_q, alpha_kv):
    """SPEC 2 in numpy, one head and query at a time."""
    w, x = jax.tree.map(np.asarray, w), np.asarray(x)
    q = (_norm(x @ w["q_a_proj"], w["q_a_layernorm"]) @ w["q_b_proj"]) * alpha_q
    q = q.reshape(ROWS, TOKENS, H, NOPE + ROPE)
    low = x @ w["kv_a_proj_with_mqa"]
    kv = (_norm(low[..., :C], w["kv_a_layernorm"]) * alpha_kv) @ w["kv_b_proj"]
    kv = kv.reshape(ROWS, TOKENS, H, NOPE + V)

    def turn(pairs, t):
        angle = t * CONFIG.rope_theta ** (-np.arange(0, ROPE, 2) / ROPE)
        z = (pairs[..., 0::2] + 1j * pairs[..., 1::2]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], axis=-1)

    out = np.zeros((ROWS, TOKENS, H, V))
    for b, t, h in np.ndindex(ROWS, TOKENS, H):
        query = np.concatenate([q[b, t, h, :NOPE], turn(q[b, t, h, NOPE:], t)])
        keys = [np.concatenate([kv[b, s, h, :NOPE], turn(low[b, s, C:], s)]) for s in range(t + 1)]
        score = np.array(keys) @ query * (NOPE + ROPE) ** -0.5
        share = np.exp(score - score.max())
        out[b, t, h] = share / share.sum() @ kv[b, : t + 1, h, NOPE:]
    return out.reshape(ROWS, TOKENS, H * V) @ w["o_proj"]


def test_expanded_attention_equals_the_formula_with_both_scale_corrections(attention):
    weights, x = attention
    out, _ = jax.jit(lambda w, x: expanded(CONFIG, x, w, _tokens()))(weights, x)
    alpha_q, alpha_kv = (D / Q) ** 0.5, (D / C) ** 0.5
    assert relative_error(out, _by_hand(x, weights, alpha_q, alpha_kv)) <= 1e-12
    # Without either correction the same formula is far off.
    assert relative_error(out, _by_hand(x, weights, 1, alpha_kv)) > 1e-2
    assert relative_error(out, _by_hand(x, weights, alpha_q, 1)) > 1e-2


def test_cached_latent_is_normed_and_scaled_and_its_rope_key_is_not_scaled(attention):
    weights, x = attention
    _, latent = jax.jit(lambda w, x: expanded(CONFIG, x, w, _tokens()))(weights, x)
    low = np.asarray(x @ weights["kv_a_proj_with_mqa"])
    wanted = _norm(low[..., :C], np.asarray(weights["kv_a_layernorm"])) * (D / C) ** 0.5
    assert relative_error(latent[..., :C], wanted) <= 1e-13
    lengths = np.linalg.norm(low[..., C:], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(latent[..., C:], axis=-1), lengths, rtol=1e-12)


@pytest.mark.parametrize("steps", [(13,), (8, 4, 1)])
def test_absorbed_attention_over_a_cache_equals_the_expanded_one(attention, steps):
    weights, x = attention
    whole, latent = jax.jit(lambda w, x: expanded(CONFIG, x, w, _tokens()))(weights, x)
    # What stands past the length must not matter.
    entries = jnp.full((ROWS, ENTRIES, C + ROPE), jnp.nan)
    cache, parts, start = LatentCache(entries, jnp.zeros(ROWS, jnp.int32)), [], 0
    for count in steps:
        cache = cache.replace(lengths_B=cache.lengths_B + count)
        run = jax.jit(lambda x, w, t, c: absorbed(CONFIG, x, w, t, c))
        part, cache = run(x[:, start : start + count], weights, _tokens(start, count), cache)
        parts.append(part)
        start += count
    assert relative_error(jnp.concatenate(parts, axis=1), whole) <= 1e-12
    assert relative_error(cache.entries_RSU[:, :TOKENS], latent) <= 1e-14
    np.testing.assert_array_equal(cache.lengths_B, [TOKENS] * ROWS)
    assert np.isnan(cache.entries_RSU[:, TOKENS:]).all()


def test_rotation_turns_interleaved_pairs_and_depends_on_distance_only():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(ROWS, TOKENS, H, ROPE)))
    table = rope_table(CONFIG, jnp.broadcast_to(jnp.arange(TOKENS)[None], (ROWS, TOKENS)))
    far = rope_table(CONFIG, jnp.broadcast_to(jnp.arange(TOKENS)[None] + 100, (ROWS, TOKENS)))
    pairs = np.asarray(x[..., 0::2] + 1j * x[..., 1::2])
    turned = pairs * np.exp(1j * np.arange(TOKENS)[:, None, None] * rope_frequencies(CONFIG)[0])
    out = np.asarray(rotate(x, table))
    np.testing.assert_allclose(out[..., :3] + 1j * out[..., 3:], turned, rtol=1e-12)
    near_scores = jnp.einsum("bthp,bshp->bhts", rotate(x, table), rotate(x, table))
    far_scores = jnp.einsum("bthp,bshp->bhts", rotate(x, far), rotate(x, far))
    assert relative_error(far_scores, near_scores) <= 1e-12


def test_rotating_the_last_columns_leaves_the_others_and_so_does_its_gradient():
    rng = np.random.default_rng(1)
    x, dout = (jnp.asarray(rng.normal(size=(ROWS, TOKENS, H, NOPE + ROPE))) for _ in range(2))
    table = rope_table(CONFIG, jnp.broadcast_to(jnp.arange(TOKENS)[None], (ROWS, TOKENS)))

    def plain(x):
        return jnp.concatenate([x[..., :NOPE], rotate(x[..., NOPE:], table)], axis=-1)

    wanted, wanted_vjp = jax.vjp(plain, x)
    out, vjp = jax.vjp(lambda x: rotate_last(x, table), x)
    assert relative_error((out, vjp(dout)), (wanted, wanted_vjp(dout))) <= 1e-15


def test_yarn_scales_slow_pairs_keeps_fast_ones_and_enters_the_softmax_scale():
    scaling = RopeScaling(factor=4.0, original_max_position_embeddings=64, mscale=0.5)
    config = dataclasses.replace(CONFIG, qk_rope_head_dim=32, rope_scaling=scaling)
    plain = dataclasses.replace(config, rope_scaling=None)
    frequency, gain = rope_frequencies(config)
    ratio = frequency / rope_frequencies(plain)[0]
    assert ratio[0] == 1 and abs(ratio[-1] - 1 / 4) < 1e-12
    assert (np.diff(ratio) <= 1e-15).all() and len(set(ratio)) > 3
    assert gain == pytest.approx(0.1 * np.log(4) + 1)
    assert attention_scale(config) == attention_scale(plain) == 37**-0.5
    both = dataclasses.replace(scaling, mscale_all_dim=0.8)
    config = dataclasses.replace(config, rope_scaling=both)
    assert rope_frequencies(config)[1] == pytest.approx(
        (0.05 * np.log(4) + 1) / (0.08 * np.log(4) + 1)
    )
    assert attention_scale(config) == pytest.approx(37**-0.5 * (0.08 * np.log(4) + 1) ** 2)
