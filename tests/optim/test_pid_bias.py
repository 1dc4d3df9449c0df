"""The router bias' controller against the formula, and closing the loop on a synthetic router."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.config import PidConfig
from longcat_jax.optim.pid_bias import budget_error, pid_bias
from tests.helpers import exact, tiny_config

MODEL = tiny_config().model
L, N, E, K, K_E = 2, 8, 17, 4, 2.5
TARGET = K_E / K / N


@pytest.fixture(autouse=True)
def _exact():
    with exact():
        yield


def _params(bias=0.0):
    bias_LE = jnp.broadcast_to(jnp.asarray(bias, jnp.float64), (L, E))
    router = {"e_score_correction_bias": bias_LE, "classifier": jnp.ones((L, 3, E))}
    return {"layers": {"mlp": {"router": router}}, "norm": jnp.ones(5)}


def _loads(steps, seed=0):
    """Selections of T tokens, K each."""
    share = np.random.default_rng(seed).dirichlet(np.ones(E), size=(steps, L))
    return np.round(1000 * share).astype(np.int32)


def _run(pid, loads, gain=lambda count: 0.3):
    """Bias updates of successive optimizer steps [steps, L, E]."""
    tx, params = pid_bias(MODEL, pid, gain), _params()
    update = jax.jit(lambda load, state: tx.update(params, state, params, load_LE=load))
    state, deltas = tx.init(params), []
    for load in loads:
        updates, state = update(load, state)
        deltas.append(updates["layers"]["mlp"]["router"]["e_score_correction_bias"])
    return np.array(deltas)


def _errors(loads):
    return TARGET - loads[..., :N] / loads.sum(-1, keepdims=True)


def test_gains_0_mu_0_give_the_paper_s_formula_and_leave_identity_experts():
    loads = _loads(5)
    deltas = _run(PidConfig(), loads)
    np.testing.assert_allclose(deltas[..., :N], 0.3 * _errors(loads), rtol=1e-13)
    assert (deltas[..., N:] == 0).all()


def test_error_is_zero_at_the_budget_and_without_tokens_it_is_finite():
    load = np.concatenate([np.full((L, N), 5.0), np.full((L, E - N), 24 / 9)], axis=-1)
    np.testing.assert_allclose(budget_error(jnp.asarray(load), MODEL), 0, atol=1e-15)
    assert np.isfinite(budget_error(jnp.zeros((L, E)), MODEL)).all()


def test_only_the_bias_update_is_replaced():
    tx, params = pid_bias(MODEL, PidConfig(), lambda count: 0.3), _params()
    updates = jax.tree.map(lambda x: 7 * jnp.ones_like(x), params)
    out, _ = tx.update(updates, tx.init(params), params, load_LE=_loads(1)[0])
    router = out["layers"]["mlp"]["router"]
    assert (out["norm"] == 7).all() and (router["classifier"] == 7).all()
    # What Adam made of the bias is dropped, the identity experts' too: imported values stay.
    assert (router["e_score_correction_bias"][:, N:] == 0).all()
    assert (jnp.abs(router["e_score_correction_bias"][:, :N]) < 0.3).all()


@pytest.mark.parametrize("every", [1, 3])
def test_kp_and_kd_follow_a_hand_written_pid_in_velocity_form(every):
    kp, kd = 0.7, 0.2

    def mu(count):
        return 0.3 - 0.01 * count

    loads = _loads(5 * every)
    deltas = _run(PidConfig(kp=kp, kd=kd, every=every), loads, mu)
    errors = _errors(loads.reshape(5, every, L, E).sum(1))
    # Position form: b_n = kp e_n + sum mu_n e_n + kd (e_n - e_{n-1}), differenced; before the first
    # update the error is taken to have stood where it is.
    past = np.concatenate([errors[:1], errors[:1], errors])
    for n in range(5):
        e, last, before = past[n + 2], past[n + 1], past[n]
        wanted = kp * (e - last) + mu((n + 1) * every - 1) * e + kd * ((e - last) - (last - before))
        at = (n + 1) * every - 1
        np.testing.assert_allclose(deltas[at, :, :N], wanted, rtol=1e-10, atol=1e-15)


def test_every_n_sums_the_loads_and_updates_once_in_n_steps():
    loads = _loads(9)
    loads[1] *= 50  # a mean of shares would weigh this step like the others
    deltas = _run(PidConfig(every=3), loads)
    moved = [at for at in range(9) if (deltas[at] != 0).any()]
    assert moved == [2, 5, 8]
    summed = loads.reshape(3, 3, L, E).sum(1)
    np.testing.assert_allclose(deltas[2::3, :, :N], 0.3 * _errors(summed), rtol=1e-12)


def _closed_loop(mu, steps, *, skewed=1.0, tokens=600):
    """A skewed synthetic router under the controller: mean real experts and max/mean load after."""
    rng = np.random.default_rng(1)
    skew = skewed * rng.normal(size=(L, 1, E))
    tx = pid_bias(MODEL, PidConfig(), lambda count: mu)

    @jax.jit
    def step(bias, state, noise):
        p = jax.nn.softmax(skew + 0.5 * noise, axis=-1)
        _, ids = jax.lax.top_k(p + bias[:, None], K)
        load = jax.nn.one_hot(ids, E, dtype=jnp.int32).sum((1, 2))
        updates, state = tx.update(_params(), state, load_LE=load)
        return bias + updates["layers"]["mlp"]["router"]["e_score_correction_bias"], state, load

    bias, state, loads = jnp.zeros((L, E)), tx.init(_params()), []
    for _ in range(steps):
        bias, state, load = step(bias, state, rng.normal(size=(L, tokens, E)))
        loads.append(load)
    recent = np.sum(loads[-20:], axis=0)
    real = recent[:, :N]
    return real.sum(-1) / recent.sum(-1) * K, real.max(-1) / real.mean(-1), np.asarray(bias)


def test_a_skewed_router_converges_to_the_budget_and_to_balanced_loads():
    experts_per_token, max_load, bias = _closed_loop(0.1, 150)
    np.testing.assert_allclose(experts_per_token, K_E, rtol=0.02)
    assert (max_load < 1.15).all()
    assert (bias[:, N:] == 0).all()


def test_without_control_the_same_router_stays_skewed():
    _, max_load, bias = _closed_loop(0.0, 40)
    assert (bias == 0).all()
    assert (max_load > 2).all()


def test_without_control_random_routing_gives_k_n_over_n_plus_z_and_misses_the_budget():
    experts_per_token, _, _ = _closed_loop(0.0, 40, skewed=0.0)
    np.testing.assert_allclose(experts_per_token, K * N / E, rtol=0.01)
    assert (np.abs(experts_per_token - K_E) > 0.2 * K_E).all()


def test_a_model_without_identity_experts_is_balanced_only():
    model = dataclasses.replace(MODEL, zero_expert_num=0, moe_topk_real=4.0)
    load = jnp.asarray([[100, 20, 30, 10, 0, 0, 0, 0]])
    error = budget_error(load, model)
    np.testing.assert_allclose(error.sum(), 0, atol=1e-15)
    assert float(error[0, 0]) == 1 / 8 - 100 / 160
