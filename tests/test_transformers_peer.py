"""What the benchmarks hand to transformers, and what they say of it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import longcat_jax as lc
from experiments.bench import decode, transformers_peer
from longcat_jax.hf.from_hf import from_hf
from longcat_jax.parameters import by_path
from tests.helpers import tiny_config
from tests.hf.variants import GOLDEN, read_tensors, same_bits


def test_its_weights_are_those_of_the_file_that_ours_came_from(tmp_path: Path) -> None:
    from_hf(GOLDEN / "tiny", tmp_path / "ours")
    model = lc.load(tmp_path / "ours")
    arrays = by_path(jax.tree.map(np.asarray, model.params))
    named = transformers_peer.named_weights(arrays, model.config)
    found = {tensor.name: rows for tensor, rows in named}
    same_bits(read_tensors(GOLDEN / "tiny"), found)


def test_agreement_counts_positions_and_weighs_differences() -> None:
    theirs = np.array([[[3.0, 4.0], [4.0, 3.0]]])
    text = transformers_peer.agreement(theirs, theirs)
    assert "same at 100.0% of 2 positions" in text and "by 0.00%" in text
    text = transformers_peer.agreement(theirs + [[[0, 0], [-2, 0]]], theirs)
    assert "same at 50.0% of 2 positions" in text and "by 28.28%" in text


def test_without_transformers_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert transformers_peer.apart(pytest.fail) is None
    line = "transformers is left out: torch and transformers not installed\n"
    assert capsys.readouterr().out == line


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("mtp", [0, 1])
def test_it_computes_our_logits_and_trains_on_our_loss(mtp: int) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with jax.default_matmul_precision("highest"):
        sizes = {"dtype": "float32", "num_nextn_predict_layers": mtp}
        model = decode.random_model(tiny_config(model=sizes).model)
        tokens = np.random.default_rng(0).integers(
            0, model.config.vocab_size, (4, 21), dtype=np.int32
        )
        ours = lc.forward(model, tokens[:, :-1]).logits
        theirs = transformers_peer.load(model)
        assert np.abs(ours - transformers_peer.logits(theirs, tokens[:, :-1])).max() <= 5e-5
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(ours), tokens[:, 1:, None], axis=-1)
        training = transformers_peer.train(theirs, [tokens])
        assert abs(training.loss + logprobs.mean()) <= 1e-5
        assert np.abs(ours - transformers_peer.logits(theirs, tokens[:, :-1])).max() > 1e-4
