"""The mesh: sharded training equals one device's, nothing large replicated, one start anywhere."""

import collections
import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.cli.config_file import load_config
from longcat_jax.config import ConfigError, MeshConfig, override
from longcat_jax.losses import next_token_nats
from longcat_jax.parallel import hlo
from longcat_jax.parameters import by_path, unbox
from longcat_jax.sharding import make_mesh
from longcat_jax.train_step import (
    abstract_boxes,
    abstract_state,
    compile_train_step,
    evaluation_step,
    init_state,
    router_watch,
    with_room,
)
from pallas_kernels import HOPPER, made_for
from tests.helpers import (
    TOKENS,
    exact,
    random_batch,
    random_params,
    relative_error,
    tiny_config,
    token_bytes,
    trained,
)

MEBIBYTE = 2**20
DATA_EXPERT = (("data", 2), ("expert", 4))
FSDP_CONTEXT_EXPERT = (("fsdp", 2), ("context", 2), ("expert", 2))
CHUNKED = (("token_chunks", 2),)
BACKENDS = [
    (("expert_backend", "dense"),),
    (("expert_backend", "allgather"),),
    (("expert_backend", "all_to_all"), ("dropless", True)),
    (("expert_backend", "all_to_all"), *CHUNKED),
]


def _assert_equal(many, one):
    for a, b in zip(many.losses, one.losses, strict=True):
        assert relative_error(a, b) <= 1e-10
    # Step 1's Adam moments hold the gradients; all of the state, the router bias too, follows.
    for a, b in zip(many.states, one.states, strict=True):
        assert relative_error(a, b) <= 1e-10
    assert many.kept, "the step keeps shardings and dtypes"


SLOW = [((("data", 2), ("fsdp", 2)), ())]
SLOW += [(mesh, way) for mesh in (DATA_EXPERT, FSDP_CONTEXT_EXPERT) for way in BACKENDS]
SLOW += [(DATA_EXPERT, CHUNKED)]


@pytest.mark.parametrize(
    ("mesh", "parallel"),
    [(FSDP_CONTEXT_EXPERT, CHUNKED)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
)
def test_training_on_a_mesh_equals_training_on_one_device(mesh, parallel):
    with exact():
        _assert_equal(trained(mesh=mesh, parallel=parallel), trained())


@pytest.mark.slow
def test_accumulation_and_remat_on_a_mesh_change_nothing():
    with exact():
        many = trained(
            accumulate=2, remat="selective", mesh=FSDP_CONTEXT_EXPERT, parallel=BACKENDS[2]
        )
        for a, b in zip(many.losses, trained().losses, strict=True):
            assert relative_error(a, b) <= 1e-10
        assert relative_error(many.states[-1], trained().states[-1]) <= 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [*BACKENDS, CHUNKED])
def test_eight_expert_parallel_devices_equal_one(parallel):
    sizes = (("vocab_size", 48), ("q_lora_rank", 32), ("kv_lora_rank", 40))  # that 8 divides
    with exact():
        many = trained(mesh=(("expert", 8),), parallel=parallel, model=sizes)
        _assert_equal(many, trained(model=sizes))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [DATA_EXPERT, FSDP_CONTEXT_EXPERT])
def test_float32_loss_on_a_mesh_is_that_of_one_device(mesh):
    narrow = (("dtype", "float32"),)
    with exact():
        many, one = trained(mesh=mesh, model=narrow), trained(model=narrow)
        assert many.losses[0]["loss"] == pytest.approx(one.losses[0]["loss"], rel=2e-5)


@pytest.mark.slow
def test_what_a_capacity_leaves_out_is_in_the_step_s_metrics():
    short = (("dropless", False), ("capacity_factor", 0.4))
    with exact():
        metrics = trained(mesh=DATA_EXPERT, parallel=short).losses[0]
        real = metrics["experts_per_token"]
    config, tokens = tiny_config(), (random_batch(tiny_config())["segment_ids"][:, :-1] != 0).sum()
    # Padding is routed, too, so that more than the counted tokens want room.
    room = 0.4 * config.model.moe_topk_real * config.train.global_batch * TOKENS
    layers = config.model.num_layers
    assert metrics["selections_left_out"] >= layers * (real * tokens - room) > 0


def _found(mesh, parallel):
    with exact():
        program = hlo.parse(trained(mesh=mesh, parallel=parallel).compiled)
    return hlo.collectives(program, dict(mesh))


def test_collectives_are_those_of_the_design():
    """Weights are gathered where they are used; tokens over expert, latents over context, no more.

    Bytes are those of the whole array on a device.
    """
    found, config = _found(FSDP_CONTEXT_EXPERT, CHUNKED), tiny_config()
    model, layers, chunks = config.model, config.model.num_layers, 2
    traveling = collections.Counter()
    for one in found:
        assert one.axes is not None, one
        if one.kind != "all-reduce" and one.axes in (("expert",), ("context",)):
            traveling[one.kind, one.axes, one.payload] += one.times
    float64, tokens = 8, config.train.global_batch * TOKENS // 4 // chunks  # of an expert group
    x, gates = tokens * model.hidden_size * float64, tokens * model.moe_topk * float64
    wanted = {
        ("all-gather", x): 2,  # tokens, and the sums' gradient
        ("all-gather", gates): 1,
        ("all-gather", gates // 2): 1,  # int32 ids
        ("reduce-scatter", x): 2,
        ("reduce-scatter", gates): 1,
    }
    wanted = {(k, ("expert",), b): n * layers * chunks for (k, b), n in wanted.items()}
    latents = config.train.global_batch // 4 * TOKENS * model.latent_dim * float64
    for kind in ("all-gather", "reduce-scatter"):
        wanted[kind, ("context",), latents] = 2 * layers + 1  # MTP's
    assert traveling == wanted

    with exact():
        sizes = {leaf.size for leaf in jax.tree.leaves(unbox(abstract_boxes(config)))}
    sizes |= {size // layers for size in sizes}
    sizes |= {size // 2 for size in sizes}  # experts, cut in two over expert
    sizes |= {model.hidden_size * config.train.vocab_chunk}
    sizes |= {model.hidden_size * (model.q_lora_rank + model.latent_dim)}  # side by side
    again = sum(one.times for one in found if (one.kind, one.axes) == ("all-gather", ("fsdp",)))
    assert again == 4 * layers, "both experts' weights for either pass, not kept in between"
    gathered = 0
    for one in found:
        if one.kind in ("all-gather", "reduce-scatter") and "fsdp" in one.axes:
            assert one.payload // float64 in sizes, one
            gathered += one.kind == "all-gather"
        assert one.kind in ("all-gather", "all-reduce", "reduce-scatter"), one
    assert gathered > 20


def test_no_float_scatter_on_a_mesh():
    with exact():
        compiled = trained(mesh=FSDP_CONTEXT_EXPERT, parallel=CHUNKED).compiled
    of_floats = re.compile(r"= (bf16|f\d+)\S* scatter\(")
    assert not of_floats.search(compiled)
    naive = jax.jit(jax.grad(lambda table: (table[jnp.arange(9) % 4] ** 2).sum()))
    assert of_floats.search(naive.lower(jnp.ones((5, 3))).compile().as_text())


def test_one_device_sends_nothing():
    with exact():
        assert not hlo.collectives(hlo.parse(trained().compiled), {})


@pytest.mark.parametrize(
    ("fsdp", "context", "expert"), [(8, 1, 1), (2, 1, 4), (1, 1, 8), (2, 2, 2)]
)
def test_no_large_leaf_of_the_released_model_s_state_is_replicated(fsdp, context, expert):
    axes = [f"mesh.fsdp={fsdp}", f"mesh.context={context}", f"mesh.expert={expert}"]
    config = override(load_config("configs/flash_560b.py"), axes)
    state = abstract_state(config, make_mesh(config.mesh))
    large = 0
    for path, leaf in by_path(state).items():
        size = np.prod(leaf.shape) * leaf.dtype.itemsize
        if size > MEBIBYTE:
            shard = np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            parts = fsdp * expert
            assert shard * parts == size, f"{path}: {shard} of {size} bytes on every device"
            large += 1
    # Parameters and both moments.
    assert large > 3 * 25
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    total = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert total == pytest.approx(2 * params, rel=1e-5)


def test_moments_lie_like_their_parameters():
    config = override(load_config("configs/quickstart.py"), ["mesh.fsdp=2", "mesh.data=2"])
    state = abstract_state(config, make_mesh(config.mesh))
    params = by_path(state.params)
    compared = 0
    for path, leaf in by_path(state.opt_state).items():
        for moment in ("/mu/", "/nu/"):
            if moment in path:
                assert leaf.sharding == params[path.split(moment)[1]].sharding, path
                compared += 1
    assert compared == 2 * len(params)


@pytest.mark.slow
def test_initial_values_are_the_same_on_every_mesh_and_come_of_the_seed():
    small = {"dtype": "float32", "num_nextn_predict_layers": 0}
    values = []
    with exact():
        for mesh in ({}, {"fsdp": 2, "expert": 2}):
            config = tiny_config(model=small, mesh=mesh, seed=5)
            state = init_state(config, make_mesh(config.mesh))
            values.append(by_path(jax.device_get(state)))
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


def _kernel_calls(jaxpr, *, on_shards=False):
    """For every call of a Pallas kernel: whether it stands inside of a shard_map."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("pallas_call", "mpmd_map"):
            yield on_shards
            continue
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _kernel_calls(inner, on_shards=on_shards or name == "shard_map")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(("data", 2),), FSDP_CONTEXT_EXPERT])
def test_every_kernel_works_on_a_device_s_own_part(mesh):
    """XLA cannot partition a kernel: outside of shard_map every device would run all of it."""
    widths = {"hidden_size": 256, "q_lora_rank": 128, "kv_lora_rank": 192, "vocab_size": 512}
    widths |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128}
    widths |= {"expert_ffn_hidden_size": 128, "dtype": "bfloat16"}
    config = tiny_config(model=widths, mesh=dict(mesh), train={"sequence_length": 128})
    devices = make_mesh(config.mesh)
    with made_for(HOPPER), jax.set_mesh(devices):
        state, batch = abstract_state(config, devices), random_batch(config)
        step = compile_train_step(config, devices)
        traced = step.trace(state, batch, token_bytes(config))
    calls = list(_kernel_calls(traced.jaxpr.jaxpr))
    assert len(calls) > 10 and all(calls)


def test_the_same_step_twice_on_a_mesh_is_bit_equal():
    with exact():
        many = trained(mesh=FSDP_CONTEXT_EXPERT, parallel=CHUNKED)
        state, metrics = many.run(random_batch(tiny_config()))
    assert metrics == many.losses[0]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), many.states[0])


@pytest.mark.slow
def test_evaluation_leaves_no_selection_out_where_training_does():
    tight = {"expert_backend": "all_to_all", "dropless": False, "capacity_factor": 0.4}

    def measured(**sections):
        config = tiny_config(model={"num_layers": 1}, **sections)
        params, batch = random_params(config), random_batch(config)
        with jax.set_mesh(make_mesh(config.mesh)):
            step = jax.jit(functools.partial(evaluation_step, config=config))
            return jax.device_get(step(params, batch, jax.numpy.asarray(token_bytes(config))))

    with exact():
        many = measured(mesh={"expert": 2}, parallel=tight, train={"accumulate": 8})
        assert relative_error(many, measured()) <= 1e-12


def test_a_chunk_of_an_evaluation_has_no_more_rows_than_a_training_step():
    """The released model's layout, in which the worst case is 32 times what is usual."""
    overrides = ["mesh.data=2", "mesh.fsdp=16", "mesh.expert=32", "train.accumulate=4"]
    config = override(load_config("configs/flash_560b.py"), overrides)
    found = with_room(config)
    assert found.dropless and not config.parallel.dropless
    assert found.token_chunks == 32 and 8192 // 32 * 32 * 12 <= 8192 * 8 * 1.5
    gathered = dataclasses.replace(config.mesh, expert=8)
    assert with_room(dataclasses.replace(config, mesh=gathered)) == config.parallel


@pytest.mark.slow
def test_evaluation_and_router_watch_on_a_mesh_equal_one_device():
    def measured(mesh):
        config = tiny_config(mesh=dict(mesh), parallel=dict(CHUNKED))
        arguments = random_params(config), random_batch(config)
        with jax.set_mesh(make_mesh(config.mesh)):
            sizes = jax.numpy.asarray(token_bytes(config))
            sums = jax.jit(lambda p, b: evaluation_step(p, b, sizes, config=config))
            watch = jax.jit(lambda p, b: router_watch(p, b, config=config))
            return jax.device_get((sums(*arguments), watch(*arguments)))

    with exact():
        assert relative_error(measured(FSDP_CONTEXT_EXPERT), measured(())) <= 1e-10


@pytest.mark.parametrize("chunk", [15, 44])
def test_cross_entropy_on_a_mesh_equals_that_on_one_device(chunk):
    """In chunks, and with all logits kept, where the head is cut over fsdp."""

    def both(**sections):
        config, rng = tiny_config(**sections), np.random.default_rng(0)
        batch, params = random_batch(config), random_params(config)
        hidden_BTD = jnp.asarray(rng.normal(size=(*batch["tokens"][:, 1:].shape, 24)))
        mix_BT = jnp.cos(jnp.arange(hidden_BTD[..., 0].size)).reshape(hidden_BTD.shape[:2])

        @jax.jit
        def value_and_gradients(hidden_BTD, head_DW):
            def nats(hidden_BTD, head_DW):
                out = types.SimpleNamespace(hidden_BTD=hidden_BTD)
                return next_token_nats(params | {"lm_head": head_DW}, config, batch, out)

            value_BT, vjp = jax.vjp(nats, hidden_BTD, head_DW)
            return value_BT, vjp(mix_BT)

        with jax.set_mesh(make_mesh(config.mesh)):
            return jax.device_get(value_and_gradients(hidden_BTD, params["lm_head"]))

    with exact():
        many = both(train=dict(vocab_chunk=chunk), mesh=dict(fsdp=2, expert=2, data=2))
        assert relative_error(many, both()) <= 1e-12
