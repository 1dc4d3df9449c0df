"""What every parameter says of itself: axes, role, initial variance; and the width table."""

import jax
import numpy as np
import pytest

from longcat_jax.model import longcat
from longcat_jax.optim.width_scaling import decay_mask, rate_multipliers, roles
from longcat_jax.parameters import by_path, is_box, scale_variance
from longcat_jax.sharding import RULES
from longcat_jax.train_step import abstract_boxes
from tests.helpers import SIZES, tiny_config

FLOAT32 = {**SIZES, "dtype": "float32"}


def _initial(config):
    key = jax.random.key(0, impl="rbg")  # compiles faster than the default
    init = jax.jit(lambda key: longcat.init(config.model, key, config.proxy))
    return by_path(init(key), is_box)


@pytest.fixture(scope="module")
def boxes():
    return by_path(abstract_boxes(tiny_config(model=FLOAT32)), is_box)


@pytest.fixture(scope="module")
def values():
    return _initial(tiny_config(model=FLOAT32))


def test_axes_are_as_many_as_dims_and_in_the_rule_table(boxes):
    assert len(boxes) == 48
    for path, box in boxes.items():
        assert len(box.axes) == box.value.ndim, path
        assert (box.axes[0] == "layer") == path.startswith("layers/"), path
        assert set(box.axes) <= set(RULES), path


def test_every_parameter_has_the_role_that_its_name_says(boxes):
    for path, box in boxes.items():
        leaf = path.rpartition("/")[2]
        if leaf == "embed_tokens":
            wanted = "embedding"
        elif leaf == "classifier":
            wanted = "router"
        elif leaf == "e_score_correction_bias":
            wanted = "bias"
        else:
            wanted = "norm" if "norm" in leaf else "hidden"
        assert box.role == wanted, path


def test_width_field_of_a_matrix_is_its_fan_in(boxes):
    heads = {"num_attention_heads": SIZES["num_attention_heads"] * SIZES["v_head_dim"]}
    for path, box in boxes.items():
        if box.role in ("hidden", "router"):
            fan_in = box.value.shape[-2]
            width = heads.get(box.width) or SIZES[box.width]
            assert fan_in == (2 * width if path == "mtp/eh_proj" else width), path
        else:
            assert box.width is None, path


def test_decay_pulls_matrices_and_embeddings_but_no_norms_and_no_bias(boxes):
    mask = by_path(decay_mask(abstract_boxes(tiny_config(model=FLOAT32))))
    assert mask["embed_tokens"] and mask["lm_head"] and mask["layers/mlp/router/classifier"]
    assert not mask["norm"] and not mask["layers/mlp/router/e_score_correction_bias"]
    assert not mask["layers/self_attn_1/kv_a_layernorm"] and not mask["mtp/enorm"]
    for path, box in boxes.items():
        assert mask[path] == (box.role not in ("norm", "bias")), path


def test_rates_of_s_8_are_an_eighth_for_hidden_unembedding_and_router_only():
    config = tiny_config(
        model=FLOAT32, proxy={"hidden_size": 3}, optim={"learning_rate": 1.0, "router_scale": 0.5}
    )
    boxed = abstract_boxes(config)
    role, rate = by_path(roles(boxed)), by_path(rate_multipliers(boxed, config))
    wanted = {"embedding": 1, "hidden": 1 / 8, "router": 0.5 / 8, "norm": 1, "bias": 1}
    assert rate == {path: wanted[role[path]] for path in rate}
    assert rate["lm_head"] == 1 / 8


def test_initial_variance_is_divided_by_s_for_hidden_unembedding_and_router_only(values):
    scaled = tiny_config(model=FLOAT32, proxy={"hidden_size": 3, "q_lora_rank": 7})
    small = by_path(scale_variance(values, scaled.model, scaled.proxy), is_box)
    for path, box in values.items():
        s = 1 if box.width is None else 4 if box.width == "q_lora_rank" else 8
        np.testing.assert_allclose(
            np.asarray(small[path].value), np.asarray(box.value) / s**0.5, rtol=1e-6, err_msg=path
        )
        deviation = float(np.std(box.value))
        if box.role in ("hidden", "router", "embedding"):
            assert deviation == pytest.approx(SIZES["initializer_range"], rel=0.2), path
        else:
            assert (np.asarray(box.value) == (box.role == "norm")).all(), path


def test_layers_and_matrices_of_one_shape_start_differently(values):
    for path, box in values.items():
        if path.startswith("layers/") and box.role in ("hidden", "router"):
            first, second = np.asarray(box.value)
            assert (first != second).mean() > 0.99, path
    tables = values["embed_tokens"].value, values["mtp/embed_tokens"].value
    assert (np.asarray(tables[0]) != np.asarray(tables[1])).mean() > 0.99
    attentions = (f"layers/self_attn_{i}/q_a_proj" for i in (0, 1))
    first, second = (np.asarray(values[path].value) for path in attentions)
    assert (first != second).mean() > 0.99
