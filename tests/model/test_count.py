"""Counts of the released model, by shapes alone."""

import jax
import pytest

from longcat_jax.cli.config_file import load_config
from longcat_jax.model.count import (
    active_parameters,
    mtp_parameters,
    total_parameters,
    training_flops_per_token,
)
from tests.helpers import random_params, tiny_config


@pytest.fixture(scope="module")
def released():
    return load_config("configs/flash_560b.py").model


def test_released_model_has_560_66_billion_parameters(released):
    assert round(total_parameters(released) / 1e9, 2) == 560.66


@pytest.mark.parametrize(("real", "billions"), [(0, 18.69), (8, 27.15), (12, 31.38)])
def test_released_model_has_these_active_parameters(released, real, billions):
    assert round(active_parameters(released, real) / 1e9, 2) == billions


def test_released_mtp_head_has_0_393_billion_parameters_and_its_embedding(released):
    embedding = released.vocab_size * released.hidden_size
    assert round((mtp_parameters(released) - embedding) / 1e9, 3) == 0.393


def test_released_model_takes_191_gigaflop_a_token_at_8k(released):
    assert round(training_flops_per_token(released, 8192) / 1e9) == 191


def test_totals_equal_the_leaves_of_a_real_tree():
    config = tiny_config(model={"dtype": "float32"})
    params = random_params(config)
    mtp = sum(leaf.size for leaf in jax.tree.leaves(params.pop("mtp")))
    assert mtp_parameters(config.model) == mtp
    assert total_parameters(config.model) == sum(leaf.size for leaf in jax.tree.leaves(params))
    headless = tiny_config(model={"dtype": "float32", "num_nextn_predict_layers": 0}).model
    assert mtp_parameters(headless) == 0
