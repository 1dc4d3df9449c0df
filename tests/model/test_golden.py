"""Golden numbers, made in float64 numpy and checked against transformers (tests/golden)."""

import jax
import numpy as np
import pytest

from longcat_jax.model.longcat import forward
from tests.golden.checkpoint import load_golden

TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=["tiny", "tiny_yarn"])
def golden(request):
    config, params, expected = load_golden(request.param)
    ids = expected["ids"].astype(np.int32)
    return jax.jit(lambda p, i: forward(p, config, i, mtp=True))(params, ids), expected


@pytest.mark.parametrize("field", ["logits", "hidden", "mtp_logits"])
def test_float32_forward_reproduces_the_golden_numbers(golden, field):
    out, expected = golden
    for row in (0, 1):
        actual, wanted = np.asarray(getattr(out, field)[row]), expected[f"{field}_{row}"]
        assert actual.shape == wanted.shape
        assert np.abs(actual - wanted).max() <= TOLERANCE


def test_selected_experts_equal_the_golden_ones_as_sets(golden):
    out, expected = golden
    for row in (0, 1):
        actual = np.sort(out.selected_experts[:, row], axis=-1)
        np.testing.assert_array_equal(actual, np.sort(expected[f"selected_{row}"], axis=-1))


def test_yarn_checkpoint_misses_its_numbers_when_rope_scaling_is_dropped():
    config, params, expected = load_golden("tiny_yarn")
    plain = config.__class__(**{**vars(config), "rope_scaling": None})
    out = jax.jit(lambda p, i: forward(p, plain, i))(params, expected["ids"].astype(np.int32))
    assert np.abs(out.logits[0] - expected["logits_0"]).max() > 100 * TOLERANCE


def test_mtp_reads_its_own_embedding_table_not_the_main_one():
    config, params, expected = load_golden("tiny")
    params["mtp"]["embed_tokens"] = params["embed_tokens"]
    ids = expected["ids"].astype(np.int32)
    out = jax.jit(lambda p, i: forward(p, config, i, mtp=True))(params, ids)
    assert np.abs(out.mtp_logits[0] - expected["mtp_logits_0"]).max() > 100 * TOLERANCE


def test_mtp_of_a_model_without_the_head_is_refused():
    config, params, expected = load_golden("tiny")
    del params["mtp"]
    with pytest.raises(ValueError, match="no MTP head"):
        forward(params, config, expected["ids"].astype(np.int32), mtp=True)
