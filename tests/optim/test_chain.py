"""Properties of the transforms in the chain and of the chain, on the tiny model's own tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longcat_jax.optim.chain import make_optimizer
from longcat_jax.optim.pid_bias import pid_bias
from longcat_jax.optim.width_scaling import scale_by_width
from longcat_jax.parameters import by_path, is_box
from longcat_jax.train_step import abstract_boxes
from tests.helpers import exact, random_params, tiny_config

LOAD = np.ones((2, 17), np.int32)
BIAS = "layers/mlp/router/e_score_correction_bias"


@pytest.fixture(autouse=True)
def _exact():
    with exact():
        yield


NO_MTP = {"num_nextn_predict_layers": 0}


def _chain(**optim):
    config = tiny_config(model=NO_MTP, optim={"learning_rate": 0.01, "balance": {}, **optim})
    return config, make_optimizer(config, abstract_boxes(config)), random_params(config)


def _step(tx, grads, params, state=None):
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params, load_LE=LOAD)


def _constant(params, value):
    return jax.tree.map(lambda x: np.full_like(x, value), params)


@pytest.mark.slow
def test_tiny_gradients_still_give_full_size_steps():
    _, tx, params = _chain(weight_decay=0.0)
    updates, _ = _step(tx, _constant(params, 1e-12), params)
    for path, update in by_path(updates).items():
        if path != BIAS:
            # g / (g + 1e-16) of the first, bias-corrected step; eps 1e-8 would leave 1e-4 of it.
            np.testing.assert_allclose(update, -0.01, rtol=2e-4, err_msg=path)


def test_eps_comes_from_the_configuration():
    _, tx, params = _chain(weight_decay=0.0, eps=1e-8)
    updates, _ = _step(tx, _constant(params, 1e-12), params)
    np.testing.assert_allclose(updates["norm"], -0.01 * 1e-4, rtol=1e-3)


def test_clipping_scales_all_gradients_by_one_factor_and_only_when_too_long():
    norm = float(optax.tree.norm(_constant(_chain()[2], 2.0)))
    moments = {}
    for name, clip in (("clipped", norm / 4), ("free", norm * 4)):
        _, tx, params = _chain(clip_norm=clip, beta1=0.5)
        _, state = _step(tx, _constant(params, 2.0), params)
        moments[name] = optax.tree.get(state, "mu")
    # mu = (1 - beta1) * clipped gradient
    for path, value in by_path(moments["clipped"]).items():
        np.testing.assert_allclose(value, 0.5 * 2.0 / 4, rtol=1e-12, err_msg=path)
    for path, value in by_path(moments["free"]).items():
        np.testing.assert_allclose(value, 0.5 * 2.0, rtol=1e-12, err_msg=path)


def test_decay_is_decoupled_and_spares_norms_and_the_bias():
    config, tx, params = _chain(weight_decay=0.25)
    updates, _ = _step(tx, _constant(params, 0.0), params)
    roles = by_path(abstract_boxes(config), is_box)
    for path, update in by_path(updates).items():
        value = by_path(params)[path]
        if roles[path].role in ("embedding", "hidden", "router"):
            np.testing.assert_allclose(update, -0.01 * 0.25 * value, rtol=1e-12, err_msg=path)
        elif roles[path].role == "norm":
            assert (update == 0).all(), path


def test_width_s_8_and_the_router_s_factor_scale_steps_and_decay_together():
    plain = tiny_config(model=NO_MTP, optim={"learning_rate": 0.01, "balance": {}})
    wide = tiny_config(
        model=NO_MTP,
        optim={"learning_rate": 0.01, "balance": {}, "router_scale": 0.5},
        proxy={"hidden_size": 3},
    )
    params = random_params(plain)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    updates = [
        by_path(_step(make_optimizer(c, abstract_boxes(c)), grads, params)[0])
        for c in (plain, wide)
    ]
    factor = {"embedding": 1, "norm": 1, "hidden": 1 / 8, "router": 1 / 16}
    for path, box in by_path(abstract_boxes(plain), is_box).items():
        if path != BIAS:
            scaled = factor[box.role] * updates[0][path]
            np.testing.assert_allclose(updates[1][path], scaled, rtol=1e-12, err_msg=path)


def test_scale_by_width_multiplies_each_leaf_by_its_own_number():
    tx = scale_by_width({"a": 0.5, "b": {"c": 3.0}})
    updates, state = tx.update({"a": jnp.ones(2), "b": {"c": jnp.ones(3)}}, tx.init(None))
    assert (updates["a"] == 0.5).all() and (updates["b"]["c"] == 3).all()
    assert jax.tree.leaves(state) == []


def test_chain_follows_the_learning_rate_schedule():
    _, tx, params = _chain(weight_decay=0.0, warmup_steps=4)
    state, steps = tx.init(params), []
    for _ in range(6):
        updates, state = _step(tx, _constant(params, 1.0), params, state)
        steps.append(-float(updates["norm"][0]))
    # Adam's step for a constant gradient is 1.
    rise = [0.01 * (1 / 4 + 3 / 4 * step / 4) for step in range(4)]
    np.testing.assert_allclose(steps, [*rise, 0.01, 0.01], rtol=1e-6)


def test_the_bias_moves_by_the_controller_alone():
    config, tx, params = _chain(pid={"mu": 0.3, "mu_final": 0.3, "kp": 0.2})
    updates, _ = _step(tx, _constant(params, 5.0), params)
    pid = pid_bias(config.model, config.optim.pid, lambda count: 0.3)
    alone, _ = pid.update(_constant(params, 0.0), pid.init(params), load_LE=LOAD)
    np.testing.assert_allclose(by_path(updates)[BIAS], by_path(alone)[BIAS], rtol=1e-6)
    assert (by_path(updates)[BIAS][:, :8] != 0).all()


def test_chain_refuses_an_update_without_loads():
    _, tx, params = _chain()
    with pytest.raises(TypeError, match="load_LE"):
        tx.update(_constant(params, 1.0), tx.init(params), params)
