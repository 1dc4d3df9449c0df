"""Generation against the golden tokens, the forward pass and itself."""

import functools

import numpy as np
import pytest

import longcat_jax as lc
from longcat_jax.inference.generate import STRIDE, make_request, run
from longcat_jax.model.longcat import Model
from tests.golden.checkpoint import load_golden

# One shape for most tests: programs are compiled once.
NEW = 16


@functools.cache
def golden(name: str) -> tuple[Model, list[int], list[int]]:
    """-> (model, prompt of 9, its 16 greedy tokens)."""
    config, params, expected = load_golden(name)
    return Model(config, params), expected["greedy_prompt"].tolist(), expected["greedy"].tolist()


def some_ids(length: int) -> list[int]:
    return np.random.default_rng(length).integers(0, 136, length).tolist()


@pytest.mark.parametrize("name", ["tiny", "tiny_yarn"])
def test_greedy_reproduces_the_golden_tokens(name: str) -> None:
    model, prompt, wanted = golden(name)
    gen = lc.generate(model, [prompt], max_new_tokens=NEW, temperature=0.0)
    assert gen.tokens == [wanted]
    assert gen.texts is None


def forward_logprobs(model: Model, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Of `tokens` after `prompt`, by one pass over both."""
    logits = np.asarray(lc.forward(model, [prompt + tokens]).logits[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs[len(prompt) - 1 + np.arange(len(tokens)), tokens]


def test_logprobs_are_the_forward_pass_ones() -> None:
    model, prompt, greedy = golden("tiny")
    gen = lc.generate(model, [prompt], max_new_tokens=NEW)
    logprobs = forward_logprobs(model, prompt, greedy)
    np.testing.assert_allclose(gen.logprobs[0], logprobs, rtol=0, atol=1e-4)
    assert all(isinstance(value, float) for value in gen.logprobs[0])


def test_rows_of_a_ragged_batch_are_as_alone() -> None:
    model, prompt, greedy = golden("tiny")
    settings = dict(max_new_tokens=NEW, temperature=0.9, top_k=30, top_p=0.95, eos=())
    long, short = some_ids(20), some_ids(3)
    batch = lc.generate(model, [prompt, long, short], seed=[11, 12, 13], **settings)
    same = lc.generate(model, [short, long, prompt], seed=13, **settings)
    alone = lc.generate(model, [short], seed=13, **settings)
    assert batch.tokens[2] == alone.tokens[0] == same.tokens[0]
    np.testing.assert_allclose(batch.logprobs[2], alone.logprobs[0], rtol=0, atol=1e-5)
    # A key belongs to a place in the row: from its own first tokens on a sample goes on as it did.
    rest = lc.generate(model, [short + alone.tokens[0][:4]], seed=13, **settings)
    assert rest.tokens[0][: NEW - 4] == alone.tokens[0][4:]
    # Another seed is another sample, and none is the greedy one.
    assert batch.tokens[0] != same.tokens[2] and batch.tokens[1] != same.tokens[1]
    assert greedy not in (batch.tokens[0], same.tokens[2])
    # Temperature and filters change what is drawn, not how its probability is told.
    logprobs = forward_logprobs(model, prompt, batch.tokens[0])
    np.testing.assert_allclose(batch.logprobs[0], logprobs, rtol=0, atol=1e-4)


def test_end_id_stops_a_row_and_is_included() -> None:
    model, prompt, greedy = golden("tiny")
    end = greedy.index(98) + 1
    gen = lc.generate(model, [prompt], max_new_tokens=NEW, eos=98)
    assert gen.tokens == [greedy[:end]] and len(gen.logprobs[0]) == end == 5
    # Of one token to choose from every sample is greedy; shapes are those of the test above.
    settings = dict(max_new_tokens=NEW, temperature=0.9, top_k=1)
    prompts = [some_ids(20), prompt, some_ids(3)]
    free = lc.generate(model, prompts, eos=(), **settings)
    batch = lc.generate(model, prompts, eos=98, **settings)
    assert free.tokens[1] == greedy and batch.tokens[1] == greedy[:end]
    for stopped, whole in zip(batch.tokens, free.tokens, strict=True):
        assert stopped == (whole[: whole.index(98) + 1] if 98 in whole else whole)
    assert max(map(len, batch.tokens)) > end


def test_loop_ends_with_the_last_row_or_at_the_limit() -> None:
    model, prompt, greedy = golden("tiny")

    def steps(**arguments: object) -> int:
        request = make_request(model, [prompt], max_new_tokens=NEW, **arguments)
        state = run(model.params, request.inputs, config=model.config, max_new_tokens=NEW)
        return int(state.step)

    # Whether all have ended is seen after the first token, then after every stride.
    assert steps(eos=greedy[0]) == 1
    assert greedy.index(98) == 4 and steps(eos=98) == 1 + STRIDE
    assert steps(eos=()) == 1 + 4 * STRIDE == NEW + 1
    request = make_request(model, [prompt], max_new_tokens=NEW)
    assert request.run(limit=3).tokens == [greedy[:3]]
    assert len(request.run(limit=3).logprobs[0]) == 3
    assert request.run().tokens == [greedy]


def test_end_id_of_the_model_is_the_default() -> None:
    model, prompt, _ = golden("tiny")
    config = model.config.__class__(**{**vars(model.config), "eos_token_id": 98})
    request = make_request(Model(config, model.params), [prompt])
    assert request.inputs.end_ids.tolist() == [98]
    assert make_request(model, [prompt], eos=[4, 7]).inputs.end_ids.tolist() == [4, 7]


def test_prompts_are_padded_to_few_lengths() -> None:
    model, *_ = golden("tiny")
    shapes = {
        make_request(model, [some_ids(n), [5]]).inputs.prompts.tokens_BT.shape
        for n in range(2, 65, 3)
    }
    assert shapes == {(2, 16), (2, 32), (2, 64)}


BAD = [
    (dict(prompts="text"), "prompts: must be a list of prompts"),
    (dict(prompts=7), "prompts: must be a list of prompts"),
    (dict(prompts=[3, 4]), "prompts[0]: must be a text or a list of token ids"),
    (dict(prompts=[[3], {4}]), "prompts[1]: must be a text or a list of token ids"),
    (dict(prompts=[[[3]]]), "prompts[0]: must be a text or a list of token ids"),
    (dict(prompts=[]), "prompts: must hold at least one prompt"),
    (dict(prompts=[[3], []]), "prompts[1]: is empty"),
    (dict(prompts=["text"]), "prompts[0]: is text, but the model has no tokenizer"),
    (dict(prompts=[[3, 136]]), "prompts[0]: token id 136 is outside of the vocabulary (0 to 135)"),
    (dict(prompts=[[-1]]), "prompts[0]: token id -1 is outside of the vocabulary"),
    (dict(prompts=[[1.5]]), "prompts[0]: must be integer token ids, not float64"),
    (dict(max_new_tokens=0), "max_new_tokens=0: must be an integer >= 1"),
    (dict(max_new_tokens=True), "max_new_tokens=True: must be an integer >= 1"),
    (dict(max_new_tokens=127), "max_new_tokens=127: with a prompt of 2 tokens this passes the mod"),
    (dict(temperature=-1), "temperature=-1: must be a finite number >= 0"),
    (dict(seed=-1), "seed=-1: must be an integer >= 0"),
    (dict(seed=2**32), "seed=4294967296: must be at most 4294967295"),
    (dict(seed=[1, 2]), "seed: 2 seeds for 1 prompts"),
    (dict(eos="x"), "eos='x': must be an integer >= 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_one_line(change: dict, message: str) -> None:
    model, *_ = golden("tiny")
    with pytest.raises(ValueError) as caught:
        lc.generate(model, **{"prompts": [[3, 4]], **change})
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([3, 4], "tokens_BT: must be [B, T] and not empty, not of shape (2,)"),
        ([[], []], "tokens_BT: must be [B, T] and not empty, not of shape (2, 0)"),
        ([[3, 136]], "tokens_BT: token id 136 is outside of the vocabulary (0 to 135)"),
        ([[0.5]], "tokens_BT: must be integer token ids, not float64"),
        ([[3] * 129], "tokens_BT: 129 tokens a row; at most max_position_embeddings=128"),
    ],
)
def test_bad_tokens_of_forward_are_one_line(tokens: list, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        lc.forward(golden("tiny")[0], tokens)
    assert str(caught.value) == message
