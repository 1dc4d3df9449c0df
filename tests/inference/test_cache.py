"""Prefill and absorbed steps give what one pass over the whole row gives, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.config import MeshConfig
from longcat_jax.inference.cache import Cache, extend, prefill
from longcat_jax.model.longcat import Sequence, TrunkOutput, decoding_params, trunk
from longcat_jax.sharding import make_mesh
from tests.golden.checkpoint import load_golden
from tests.helpers import relative_error

LENGTHS = np.array([7, 4])
CHUNK, STEPS, CAPACITY = 2, 3, 17
TOTAL = 7 + CHUNK * STEPS
EXACT = 1e-10


@pytest.fixture(scope="module")
def passes() -> tuple[TrunkOutput, list[Cache], list[jax.Array], tuple[jax.Array, Cache]]:
    """Prefilled rows of 7 and 4 tokens, extended by 3 x 2, and the same tokens in one pass."""
    with jax.enable_x64(True):
        config, params, expected = load_golden("tiny", dtype="float64")
        tokens = expected["ids"][:, :TOTAL].astype(np.int32)
        whole = jax.jit(lambda p, t: trunk(p, config, Sequence.whole_rows(t)))(params, tokens)

        width = 9
        positions = np.tile(np.arange(width, dtype=np.int32), (2, 1))
        inside = (positions < LENGTHS[:, None]).astype(np.int32)
        prompt = np.where(inside, tokens[:, :width], 5)
        hidden, cache = jax.jit(lambda p, s: prefill(p, config, s, capacity=CAPACITY))(
            params, Sequence(prompt, positions, inside)
        )
        # What lies past a row's end must not matter.
        seen = np.arange(CAPACITY)[None] < LENGTHS[:, None]
        cache = cache.replace(
            entries_LABSU=jnp.where(seen[None, None, :, :, None], cache.entries_LABSU, np.nan)
        )
        step = jax.jit(lambda p, t, c: extend(p, config, t, c))
        caches, outputs = [cache], [hidden]
        for index in range(STEPS):
            chunk = np.stack(
                [tokens[b, n + CHUNK * index :][:CHUNK] for b, n in enumerate(LENGTHS)]
            )
            hidden, cache = step(params, chunk, cache)
            caches.append(cache)
            outputs.append(hidden)
        again = step(params, chunk, cache.replace(lengths_B=caches[-2].lengths_B))
        return whole, caches, outputs, again


def test_layers_are_taken_in_turns_of_several_and_the_rest(passes, monkeypatch) -> None:
    monkeypatch.setattr("longcat_jax.inference.cache.layers_to_a_turn", lambda *_: 2)
    with jax.enable_x64(True):
        config, params, expected = load_golden("tiny", dtype="float64")
        assert config.num_layers % 2
        chunk = np.stack([expected["ids"][b, n:][:CHUNK] for b, n in enumerate(LENGTHS)])
        hidden, _ = jax.jit(lambda p, t, c: extend(p, config, t, c))(
            params, chunk.astype(np.int32), passes[1][0]
        )
    assert relative_error(hidden, passes[2][1]) < EXACT


@pytest.mark.parametrize("row", [0, 1])
def test_steps_reproduce_the_whole_pass(passes, row: int) -> None:
    whole, _, outputs, _ = passes
    parts = [outputs[0][row, : LENGTHS[row]], *(hidden[row] for hidden in outputs[1:])]
    actual = np.concatenate(parts)
    assert actual.dtype == np.float64 and len(actual) == LENGTHS[row] + CHUNK * STEPS
    assert relative_error(actual, whole.hidden_BTD[row, : len(actual)]) < EXACT


@pytest.mark.parametrize("row", [0, 1])
def test_cache_holds_the_whole_pass_latents(passes, row: int) -> None:
    whole, caches, _, _ = passes
    for cache, grown in ((caches[0], 0), (caches[-1], CHUNK * STEPS)):
        length = LENGTHS[row] + grown
        assert cache.lengths_B[row] == length
        for attention in (0, 1):
            actual = cache.entries_LABSU[:, attention, row]
            wanted = whole.latents[attention][:, row, :length]
            assert actual.shape == (3, CAPACITY, 24)
            assert relative_error(actual[:, :length], wanted) < EXACT
            assert np.isnan(actual[:, length:]).all()


def test_lengths_set_back_forget_tokens(passes) -> None:
    _, caches, outputs, (hidden, cache) = passes
    np.testing.assert_array_equal(hidden, outputs[-1])
    np.testing.assert_array_equal(cache.entries_LABSU, caches[-1].entries_LABSU)
    np.testing.assert_array_equal(cache.lengths_B, LENGTHS + CHUNK * STEPS)


@pytest.mark.parametrize("rows, tokens, devices", [(65, 1, 1), (16, 5, 1), (2, 1, 2)])
def test_sixteen_bits_take_many_tokens_and_several_devices(rows, tokens, devices) -> None:
    """More than decoding's kernels take, where products come in terms all the same."""
    results = {}
    for dtype in ("bfloat16", "float32"):
        config, params, expected = load_golden("tiny", dtype=dtype)
        ids = jnp.asarray(np.resize(expected["ids"], (rows, 3 + tokens)), jnp.int32)
        params = decoding_params(params, config)

        def run(params, ids, config=config):
            prompts = Sequence.whole_rows(ids[:, :3])
            _, cache = prefill(params, config, prompts, capacity=64)
            return extend(params, config, ids[:, 3:], cache)[0]

        with jax.set_mesh(make_mesh(MeshConfig(data=devices))):
            results[dtype] = np.asarray(jax.jit(run)(params, ids), np.float64)
    error = np.linalg.norm(results["bfloat16"] - results["float32"], axis=-1)
    assert np.median(error / np.linalg.norm(results["float32"], axis=-1)) <= 0.05
