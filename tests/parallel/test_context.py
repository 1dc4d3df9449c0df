"""Sequences cut over the context axis: the order, its balance, attention across the cut."""

import jax
import numpy as np
import pytest

from longcat_jax.config import MeshConfig
from longcat_jax.model.longcat import forward
from longcat_jax.model.mla import MLA, AttentionInput
from longcat_jax.model.rope import rope_table
from longcat_jax.parallel.context import natural, zigzag, zigzag_order
from longcat_jax.sharding import make_mesh
from tests.helpers import exact, random_params, relative_error, tiny_config

ROWS, TOKENS, D = 2, 24, 24
CONFIG = tiny_config().model


def test_order_of_two_devices_by_hand():
    np.testing.assert_array_equal(zigzag_order(8, 2), [0, 1, 6, 7, 2, 3, 4, 5])


@pytest.mark.parametrize("devices", [2, 4])
def test_every_device_has_as_many_pairs_of_query_and_key(devices):
    places = zigzag_order(TOKENS, devices)
    np.testing.assert_array_equal(np.sort(places), range(TOKENS))
    pairs = (places + 1).reshape(devices, -1).sum(1)
    assert (pairs == pairs[0]).all()


def test_natural_order_comes_back_and_nothing_moves_without_the_axis():
    x = np.arange(ROWS * TOKENS).reshape(ROWS, TOKENS)
    assert zigzag(x) is x and natural(x) is x
    with jax.set_mesh(make_mesh(MeshConfig(context=4))):
        np.testing.assert_array_equal(zigzag(x)[0], zigzag_order(TOKENS, 4))
        np.testing.assert_array_equal(natural(zigzag(x)), x)


def test_forward_refuses_a_mesh_that_cuts_rows():
    with jax.set_mesh(make_mesh(MeshConfig(context=2))):
        with pytest.raises(ValueError, match="takes whole rows, the mesh cuts them over context"):
            forward({}, CONFIG, np.zeros((ROWS, TOKENS), np.int32))


def test_attention_of_packed_rows_equals_that_of_one_device():
    """Four devices, segments that end inside of and across their parts; value and gradients."""
    with exact():
        weights = random_params(tiny_config())["mtp"]["self_attn"]
        rng = np.random.default_rng(2)
        x, mix = rng.normal(size=(2, ROWS, TOKENS, D))
        segments = np.stack([np.repeat([1, 2, 3], [5, 13, 6]), np.repeat([1, 0], [20, 4])])
        positions = np.concatenate([np.arange(n) for n in (5, 13, 6)])
        positions = np.stack([positions, np.arange(TOKENS)])

        def run(weights, x, mix):
            tokens = AttentionInput(rope_table(CONFIG, zigzag(positions)), segments)

            def attend(weights, x):
                out, _ = MLA(CONFIG).apply({"params": weights}, x, tokens)
                return out

            out, pull = jax.vjp(attend, weights, zigzag(x))
            dweights, dx = pull(zigzag(mix))
            return natural(out), dweights, natural(dx)

        wanted = jax.jit(run)(weights, x, mix)
        with jax.set_mesh(make_mesh(MeshConfig(context=4))):
            # A function of its own: the mesh is no part of what a compiled one is known by.
            actual = jax.jit(lambda *arguments: run(*arguments))(weights, x, mix)
        assert relative_error(actual, wanted) <= 1e-12
