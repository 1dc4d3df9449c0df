"""Frozen parameters: no update, no moments, chosen by patterns (in training: test_init_from)."""

import jax
import numpy as np
import optax
import pytest

from longcat_jax.config import Config, ConfigError
from longcat_jax.optim.chain import make_optimizer
from longcat_jax.optim.frozen import frozen_mask
from longcat_jax.parameters import by_path, unbox
from longcat_jax.train_step import abstract_boxes
from tests.helpers import exact, random_params, tiny_config

PATTERNS = [
    ("layers/mlp/router/*", "embed_tokens"),
    ("*norm*", "layers/self_attn_?/[qk]*", "*/experts/*"),
]


def frozen_config(*patterns: str) -> Config:
    return tiny_config(optim={"freeze": patterns})


@pytest.mark.parametrize("patterns", PATTERNS)
def test_updates_of_frozen_parameters_are_zero_whatever_the_gradients(
    patterns: tuple[str, ...],
) -> None:
    """Also beside weight decay, clipping and gradients that are not finite."""
    config = frozen_config(*patterns)
    with exact():
        frozen = by_path(frozen_mask(abstract_boxes(config), patterns))
        assert any(frozen.values()) and not all(frozen.values())
        tx, params = make_optimizer(config, abstract_boxes(config)), random_params(config)
        rng = np.random.default_rng(0)
        grads = jax.tree.map(lambda p: rng.standard_normal(p.shape), params)
        load = rng.integers(1, 9, (2, 17)).astype(np.float64)

        @jax.jit
        def two_steps(params: object) -> tuple:
            _, state = tx.update(grads, tx.init(params), params, load_LE=load)
            return tx.update(grads, state, params, load_LE=load)

        updates, state = jax.device_get(two_steps(params))
        for path, update in by_path(updates).items():
            assert np.any(update) != frozen[path], path
    adam = state[1][1].inner_state
    moments = jax.tree.leaves(adam.mu, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    masked = [isinstance(moment, optax.MaskedNode) for moment in moments]
    assert masked == list(frozen.values())


def test_nothing_frozen_leaves_the_optimizer_as_it_was() -> None:
    with exact():
        shapes = unbox(abstract_boxes(tiny_config()))
        plain = jax.eval_shape(
            make_optimizer(tiny_config(), abstract_boxes(tiny_config())).init, shapes
        )
    assert isinstance(plain[1], optax.ScaleByAdamState)


@pytest.mark.parametrize(
    ("pattern", "suggestion"),
    [
        ("*/expert/*", "'*/experts/*'"),
        ("embed_token", "'embed_tokens'"),
        ("experts", "'*/experts/*'"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, suggestion: str) -> None:
    boxed = abstract_boxes(tiny_config(model={"dtype": "float32"}))
    with pytest.raises(ConfigError, match="matches no parameter; did you mean") as found:
        frozen_mask(boxed, ("lm_head", pattern))
    assert repr(pattern) in str(found.value) and suggestion in str(found.value)


def test_patterns_are_a_list_of_text() -> None:
    with pytest.raises(ConfigError, match="optim.freeze"):
        tiny_config(optim={"freeze": "lm_head"})
