"""`longcat generate` on a saved checkpoint with a tokenizer."""

import dataclasses
import types
from pathlib import Path

import numpy as np
import pytest

import longcat_jax as lc
from longcat_jax.checkpoint import Checkpoints
from longcat_jax.cli.main import main
from longcat_jax.config import Config, OptimConfig, TrainConfig, to_mapping
from longcat_jax.data.tokenizer import load_tokenizer, train_tokenizer
from tests.golden.checkpoint import load_golden

PROMPT = "def main("
VOCABULARY = 270


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with one checkpoint of a random model."""
    directory = tmp_path_factory.mktemp("run")
    small, params, _ = load_golden("tiny")
    config = Config(
        model=dataclasses.replace(small, vocab_size=VOCABULARY),
        train=TrainConfig(steps=5, global_batch=2, sequence_length=8),
        optim=OptimConfig(learning_rate=1e-3),
    )
    rng = np.random.default_rng(0)

    def widened(table: np.ndarray, axis: int) -> np.ndarray:
        shape = list(table.shape)
        shape[axis] = VOCABULARY - shape[axis]
        return np.concatenate([table, rng.normal(0, 0.2, shape).astype(table.dtype)], axis)

    # A byte-level tokenizer needs more ids than the golden model has.
    params["embed_tokens"] = widened(params["embed_tokens"], 0)
    params["mtp"]["embed_tokens"] = widened(params["mtp"]["embed_tokens"], 0)
    params["lm_head"] = widened(params["lm_head"], 1)
    checkpoints = Checkpoints(directory, config.train)
    checkpoints.save(
        3,
        params=params,
        optimizer={"count": np.zeros(2)},
        data={},
        config=to_mapping(config),
        metrics=None,
    )
    checkpoints.close()
    train_tokenizer(["def main(): return " * 9], VOCABULARY).save(directory / "tokenizer.json")
    return directory


def test_prints_prompt_completion_and_speed(
    workdir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Start and end of: a call that compiles, three of the prompt alone, and the whole.
    clock = iter([0.0, 9.5, 10.0, 10.7, 20.0, 20.5, 30.0, 30.6, 40.0, 43.0])
    monkeypatch.setattr(
        "longcat_jax.cli.generate.time", types.SimpleNamespace(perf_counter=lambda: next(clock))
    )
    arguments = ["generate", f"--checkpoint={workdir}", f"--prompt={PROMPT}", "--max_new_tokens=6"]
    sampled = ["--temperature=0.8", "--top_k=9", "--top_p=0.9", "--seed=4"]
    assert main([*arguments, *sampled]) == 0
    out, err = capsys.readouterr()
    model = lc.load(workdir)
    settings = dict(max_new_tokens=6, temperature=0.8, top_k=9, top_p=0.9, seed=4)
    gen = lc.generate(model, [PROMPT], **settings)
    assert out == PROMPT + gen.texts[0] + "\n"
    tokenizer = load_tokenizer(model.tokenizer)
    assert gen.texts == [tokenizer.decode(gen.tokens[0])] and len(gen.tokens[0]) == 6
    ids = [1, *tokenizer.encode(PROMPT)]
    assert lc.generate(model, [ids], **settings).tokens == gen.tokens
    assert err == (
        f"prompt of {len(ids)} tokens and first new token in 500.0 ms; 2 tokens/s after it "
        "(compilation, 9.0 s, not counted)\n"
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--max_new_tokens=0", "longcat generate: max_new_tokens=0: must be an integer >= 1"),
        ("--top_p=2", "longcat generate: top_p=2.0: must be above 0 and at most 1"),
        ("--seed=-3", "longcat generate: seed=-3: must be an integer >= 0"),
        ("--checkpoint=no/such", "no/such: no checkpoints here"),
    ],
)
def test_bad_values_are_one_line(
    workdir: Path, option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", f"--checkpoint={workdir}", f"--prompt={PROMPT}", option]) == 1
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and out == ""


def test_text_without_a_tokenizer_is_one_line(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    assert main(["generate", f"--checkpoint={tmp_path}", f"--prompt={PROMPT}"]) == 1
    assert "is text, but the model has no tokenizer" in capsys.readouterr().err
