"""The mesh: sharded training equals one device's, nothing large replicated, one start anywhere."""

import re

import jax
import numpy as np
import pytest

from longcat_jax.cli.config_file import load_config
from longcat_jax.config import ConfigError, MeshConfig, override
from longcat_jax.parameters import unbox
from longcat_jax.sharding import make_mesh
from longcat_jax.train_step import abstract_boxes, abstract_state, init_state
from tests.helpers import exact, relative_error, tiny_config, trained

MEBIBYTE = 2**20
ALL = (("data", 2), ("fsdp", 2), ("expert", 2))


def _by_path(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(ALL, id="data x fsdp x expert", marks=pytest.mark.slow),
        pytest.param(ALL[:2], id="data x fsdp"),
        pytest.param(ALL[1:], id="fsdp x expert", marks=pytest.mark.slow),
    ],
)
def test_training_on_a_mesh_equals_training_on_one_device(mesh):
    with exact():
        one, many = trained(), trained(mesh=mesh)
        for a, b in zip(many.losses, one.losses, strict=True):
            assert relative_error(a, b) <= 1e-10
        # Step 1's Adam moments hold the gradients; all of the state, the router bias too, follows.
        for a, b in zip(many.states, one.states, strict=True):
            assert relative_error(a, b) <= 1e-10
        assert many.kept, "the step keeps shardings and dtypes"


def test_collectives_gather_weights_and_not_the_residual_stream():
    """Weights are gathered where they are used (FSDP), never the residual stream."""
    config = tiny_config()
    with exact():
        boxed = jax.tree.leaves(unbox(abstract_boxes(config)))
    weights = {tuple(sorted(leaf.shape)) for leaf in boxed}
    weights |= {tuple(sorted(leaf.shape[1:])) for leaf in boxed}  # of one layer
    activation = config.train.global_batch * config.train.sequence_length * config.model.hidden_size
    with exact():
        found = _all_gathers(trained(mesh=ALL[:2]).compiled)
        assert not _all_gathers(trained().compiled)
    assert {tuple(sorted(shape)) for shape in found} & weights, "FSDP gathers its weights"
    for shape in found:
        known = tuple(sorted(size for size in shape if size > 1)) in weights
        assert known or np.prod(shape) < activation, f"all-gather of {shape}"


def _all_gathers(compiled: str) -> list[tuple[int, ...]]:
    """Shapes of the float arrays that come out of all-gathers."""
    shapes = re.findall(r"= f\d+\[([\d,]*)\]\S* all-gather\(", compiled)
    return [tuple(map(int, shape.split(","))) for shape in shapes]


@pytest.mark.parametrize(("fsdp", "expert"), [(8, 1), (2, 4), (1, 8)])
def test_no_large_leaf_of_the_released_model_s_state_is_replicated(fsdp, expert):
    config = override(
        load_config("configs/flash_560b.py"), [f"mesh.fsdp={fsdp}", f"mesh.expert={expert}"]
    )
    state = abstract_state(config, make_mesh(config.mesh))
    large = 0
    for path, leaf in _by_path(state).items():
        size = np.prod(leaf.shape) * leaf.dtype.itemsize
        if size > MEBIBYTE:
            shard = np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            assert shard * 8 == size, f"{path}: {shard} of {size} bytes on every device"
            large += 1
    # Parameters and both moments.
    assert large > 3 * 25
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    total = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert total == pytest.approx(2 * params, rel=1e-5)


def test_moments_lie_like_their_parameters():
    config = override(load_config("configs/quickstart.py"), ["mesh.fsdp=2", "mesh.data=2"])
    state = abstract_state(config, make_mesh(config.mesh))
    params = _by_path(state.params)
    compared = 0
    for path, leaf in _by_path(state.opt_state).items():
        for moment in ("/mu/", "/nu/"):
            if moment in path:
                assert leaf.sharding == params[path.split(moment)[1]].sharding, path
                compared += 1
    assert compared == 2 * len(params)


def test_initial_values_are_the_same_on_every_mesh_and_come_of_the_seed():
    small = {"dtype": "float32", "num_nextn_predict_layers": 0}
    values = []
    with exact():
        for mesh in ({}, {"fsdp": 2, "expert": 2}):
            config = tiny_config(model=small, mesh=mesh, seed=5)
            state = init_state(config, make_mesh(config.mesh))
            values.append(_by_path(jax.device_get(state)))
    one, many = values
    for path in one:
        np.testing.assert_array_equal(one[path], many[path], err_msg=path)
    # The table comes of the first of four keys of the job's seed.
    key = jax.random.split(jax.random.key(5), 4)[0]
    table = 0.3 * jax.random.normal(key, (44, 24), np.float32)
    np.testing.assert_allclose(one["params/embed_tokens"], table, rtol=1e-6)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"data=3 \* fsdp=4 .* needs 12 devices, 8 are here"):
        make_mesh(MeshConfig(data=3, fsdp=4))


def test_mesh_takes_the_first_devices_with_the_expert_axis_innermost():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    assert mesh.axis_names == ("data", "fsdp", "pipeline", "context", "expert")
    ids = [device.id for device in jax.devices()]
    numbers = [[device.id for device in row] for row in mesh.devices[0, :, 0, 0]]
    assert numbers == [ids[:2], ids[2:4]]
