"""The Hopper kernels on the GPU: `pytest -m gpu tests/kernels/test_on_gpu.py`, under a minute.

What the interpreter cannot show: asynchronous copies, warpgroups that really overlap, ptxas.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.inference.cache import extend, prefill
from longcat_jax.model import longcat
from longcat_jax.model.experts import real_experts
from longcat_jax.parallel.compiler import DECODING, compiler_options
from longcat_jax.sharding import batch_sharding, make_mesh
from longcat_jax.train_step import compile_train_step, state_from_params
from pallas_kernels import (
    _common,
    gather_combine,
    gather_rows,
    gather_sum,
    grouped_gemm,
    scatter_add,
)
from tests.helpers import random_batch, random_params, tiny_config, token_bytes
from tests.kernels import helpers, scatter_order

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

RUNS = 20
ROUNDING = 3e-3  # one rounding to bfloat16
HIDDEN, FFN, EXPERTS, SELECTED = 256, 128, 8, 4


@pytest.fixture(scope="module", autouse=True)
def _hopper():
    helpers.require_hopper()


def normal(seed, *shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def spread(seed, *shape, dtype="bfloat16"):
    rng = np.random.default_rng(seed)
    return jnp.asarray(helpers.values_of_many_magnitudes(rng, *shape), dtype)


def product(lhs, rhs, dout, sizes):
    run = functools.partial(grouped_gemm, group_sizes_G=sizes, implementation="mosaic")
    out, vjp = jax.vjp(run, lhs, rhs)
    return out, *vjp(dout)


@pytest.mark.parametrize(
    "sizes", [(700, 0, 1, 300), (1300, 0), (64, 128, 192, 0), (0, 0), (7, 9, 203, 4, 1)], ids=str
)
def test_grouped_gemm_equals_naive(sizes):
    rows, contract, width = 1300, 192, 576
    shapes = (rows, contract), (len(sizes), contract, width), (rows, width)
    lhs, rhs, dout = (normal(i, *shape) for i, shape in enumerate(shapes))
    wide = [np.asarray(x, np.float64) for x in (lhs, rhs, dout)]
    expected = [np.zeros((rows, width)), np.zeros((rows, contract)), np.zeros(rhs.shape)]
    ends = np.cumsum(sizes)
    for g, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
        part = slice(start, end)
        expected[0][part] = wide[0][part] @ wide[1][g]
        expected[1][part] = wide[2][part] @ wide[1][g].T
        expected[2][g] = wide[0][part].T @ wide[2][part]
    # Rows past the sum take no part, whatever they hold.
    lhs, dout = (x.at[ends[-1] :].set(jnp.nan) for x in (lhs, dout))
    got = jax.jit(product)(lhs, rhs, dout, jnp.asarray(sizes, jnp.int32))
    for actual, wanted in zip(got, expected, strict=True):
        assert helpers.relative_error(actual, wanted) <= ROUNDING
    assert not np.any(np.asarray(got[0][ends[-1] :], np.float32))


def routed(seed, tokens, rows):
    """(token of each row, rows of each token); some rows have no token, some slots no row."""
    slots = np.random.default_rng(seed).permutation(rows)[: tokens * SELECTED]
    slots = slots.reshape(tokens, SELECTED)
    slots[0, 1], slots[5] = rows, -1
    token_of_row = np.full(rows, tokens)
    for (t, _), slot in np.ndenumerate(slots):
        if 0 <= slot < rows:
            token_of_row[slot] = t
    return jnp.asarray(token_of_row, jnp.int32), jnp.asarray(slots, jnp.int32)


def dispatch(x, drows, token_of_row, slots, implementation):
    """Rows out and sums back, with their gradients."""
    indices = dict(token_of_row_R=token_of_row, slots_TK=slots, implementation=implementation)
    rows, rows_vjp = jax.vjp(functools.partial(gather_rows, **indices), x)
    out, out_vjp = jax.vjp(functools.partial(gather_sum, **indices), drows)
    return rows, *rows_vjp(drows), out, *out_vjp(x)


@pytest.mark.parametrize("width", [128, 6144])
def test_dispatch_and_combine_equal_the_reference(width):
    token_of_row, slots = routed(3, 501, 2500)
    x, drows = spread(4, 501, width), spread(5, 2500, width)
    run = jax.jit(dispatch, static_argnums=4)
    args = x, drows, token_of_row, slots
    assert helpers.same_bits(run(*args, "mosaic"), run(*args, "reference"))


def ids_of(case, rows, destinations):
    rng = np.random.default_rng(6)
    ids = rng.integers(0, destinations, rows)
    if case == "half on one":
        ids[rng.permutation(rows)[: rows // 2]] = 17
    if case == "all on one":
        ids[:] = destinations - 1
    if case == "some dropped":
        ids[::5], ids[::7] = -1, destinations
    return ids


@pytest.mark.parametrize("destinations", [301, 70_000])
@pytest.mark.parametrize("case", ["uniform", "half on one", "all on one", "some dropped"])
def test_scatter_add_adds_in_its_order(case, destinations):
    rows, width = 9001, 384
    ids, values = ids_of(case, rows, destinations), spread(7, rows, width)
    run = functools.partial(scatter_add, num_rows=destinations, implementation="mosaic")
    out = np.asarray(jax.jit(run)(values, jnp.asarray(ids, jnp.int32)))
    kept = np.unique(ids[(ids >= 0) & (ids < destinations)])
    # The order of a sum depends on where its rows stand among the sorted ones, not on its id.
    renumbered = np.searchsorted(kept, ids)
    renumbered[(ids < 0) | (ids >= destinations)] = len(kept)
    expected = scatter_order.sum_by_id(np.asarray(values, np.float32), renumbered, len(kept))
    assert helpers.same_bits(out[kept], expected)
    assert not np.delete(out, kept, axis=0).any()


def combine_and_gradients(values, weights, dout, slots):
    out, vjp = jax.vjp(
        lambda values, weights: gather_combine(values, slots, weights), values, weights
    )
    return out, *vjp(dout)


def test_repeated_runs_give_the_same_bits():
    """On sums that change with their order, beside another kernel's load."""
    sizes = jnp.asarray((700, 0, 100, 1237), jnp.int32)
    token_of_row, slots = routed(8, 501, 2500)
    operands = {
        product: (spread(0, 2048, 512), spread(1, 4, 512, 768), spread(2, 2048, 768), sizes),
        functools.partial(dispatch, implementation="mosaic"): (
            spread(3, 501, 768),
            spread(4, 2500, 768),
            token_of_row,
            slots,
        ),
        functools.partial(scatter_add, num_rows=301, implementation="mosaic"): (
            spread(5, 9001, 768),
            jnp.asarray(ids_of("half on one", 9001, 301), jnp.int32),
        ),
        combine_and_gradients: (
            spread(6, 2500, 768),
            spread(7, 501, SELECTED, dtype="float32"),
            spread(8, 501, 768),
            slots,
        ),
    }
    load, noise = jax.jit(lambda x: x @ x.T), normal(9, 4096, 4096)
    for function, args in operands.items():
        run = jax.jit(function)
        first = jax.device_get(run(*args))
        for i in range(RUNS):
            if i % 3 == 0:
                load(noise)
            assert helpers.same_bits(run(*args), first)


def experts_and_gradients(dtype):
    """Value and gradients of the real experts of an MoE layer; traced anew on every call."""
    tokens = 700
    rng = np.random.default_rng(10)
    ids = np.argsort(rng.random((tokens, EXPERTS + 4)), axis=1)[:, :SELECTED]
    experts = jnp.asarray(ids, jnp.int32)
    gates = jnp.asarray(rng.random((tokens, SELECTED)), jnp.float32)
    shapes = (tokens, HIDDEN), (EXPERTS, HIDDEN, 2 * FFN), (EXPERTS, FFN, HIDDEN), (tokens, HIDDEN)
    x, gate_up, down, dout = (
        (normal(i, *shape) * shape[-2] ** -0.5).astype(dtype) for i, shape in enumerate(shapes)
    )

    def run(x, gates, gate_up, down):
        return real_experts(x, gates, experts, gate_up, down)

    @jax.jit
    def both(*args):
        out, vjp = jax.vjp(run, *args)
        return out, *vjp(dout)

    return both(x, gates, gate_up, down)


def test_experts_gradients_equal_the_references():
    with jax.default_matmul_precision("highest"):
        exact = experts_and_gradients("float32")
    fast = experts_and_gradients("bfloat16")
    with _common.kernels("reference"):
        plain = experts_and_gradients("bfloat16")
    for ours, reference, wanted in zip(fast, plain, exact, strict=True):
        limit = 1.1 * helpers.relative_error(reference, wanted)
        assert helpers.relative_error(ours, wanted) <= limit <= 4 * ROUNDING


def small_model():
    return dict(
        vocab_size=640,
        hidden_size=HIDDEN,
        num_layers=2,
        num_attention_heads=2,
        q_lora_rank=128,
        kv_lora_rank=192,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        ffn_hidden_size=320,
        expert_ffn_hidden_size=FFN,
        n_routed_experts=EXPERTS,
        zero_expert_num=4,
        moe_topk=SELECTED,
        moe_topk_real=2.5,
        dtype="bfloat16",
    )


def test_train_step_uses_the_kernels_and_scatters_no_floats():
    config = tiny_config(model=small_model(), train=dict(global_batch=2, sequence_length=256))
    devices = make_mesh(config.mesh)
    with jax.set_mesh(devices):
        state = state_from_params(config, devices, random_params(config))
        batch = jax.device_put(random_batch(config), batch_sharding(devices))
        args = state, batch, token_bytes(config)
        # Not donated: the step runs twice from the same state.
        lowered = jax.jit(compile_train_step(config, devices).__wrapped__).lower(*args)
        compiled = lowered.compile(compiler_options(devices, deterministic=True, loop=True))
        first, second = (jax.device_get(compiled(*args)) for _ in range(2))
    text = lowered.as_text()
    kernels = (
        "grouped_gemm",
        "grouped_swiglu",
        "grouped_swiglu_gradient",
        "gather_rows",
        "rms_norm_gradient",
        "scatter_add",
    )
    attention = ("flash_mla_forward", "flash_mla_keys", "flash_mla_queries")
    assert not [name for name in (*kernels, *attention) if name not in text]
    assert not helpers.compiled_float_scatters(compiled.as_text())
    assert helpers.same_bits(first, second)
    assert np.isfinite(first[1]["loss"])


def last_hidden(config, params, tokens_BT):
    """After the final norm, [B, D], of the last token: decoded over a cache of those before."""
    prompts, last = tokens_BT[:, :-1], tokens_BT[:, -1:]
    positions = jnp.broadcast_to(jnp.arange(prompts.shape[1], dtype=jnp.int32), prompts.shape)
    sequence = longcat.Sequence(prompts, positions, jnp.ones_like(positions))
    _, cache = prefill(params, config, sequence, capacity=64)
    return extend(params, config, last, cache)[0][:, 0]


@pytest.mark.parametrize("rows", [1, 64])
def test_decoding_step_uses_the_kernels_and_is_as_exact_as_the_references(rows):
    config = tiny_config(model=small_model())
    wide = dataclasses.replace(config.model, dtype="float32")
    raw = random_params(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 640, (64, 48)), jnp.int32)

    def run(model, options=None):
        params = longcat.decoding_params(raw, model)
        lowered = jax.jit(functools.partial(last_hidden, model)).lower(params, tokens[:rows])
        compiled = lowered.compile(compiler_options=options)
        parts = [compiled(params, part) for part in jnp.split(tokens, 64 // rows)]
        return np.concatenate(parts).astype(np.float64), lowered.as_text()

    with jax.default_matmul_precision("highest"), _common.kernels("reference"):
        exact = run(wide)[0]
    with _common.kernels("reference"):
        plain = run(config.model)[0]
    fast, text = run(config.model)
    # Kernels that run beside each other where nothing has one wait for the other.
    assert helpers.same_bits(run(config.model, DECODING)[0], fast)
    attention = "mla_decode", "mla_decode_join", "absorb_query", "expand_values"
    kernels = "skinny_gemm", "skinny_swiglu", "skinny_experts", "add_norm", *attention
    assert not [name for name in kernels if name not in text]

    def errors(x):
        # A row whose router changes its mind is far off, in any bfloat16: most are not.
        distance = np.linalg.norm(x - exact, axis=1) / np.linalg.norm(exact, axis=1)
        return np.quantile(distance, [0.25, 0.5, 0.75])

    assert (errors(fast) <= 1.4 * errors(plain)).all()
    assert errors(plain)[1] <= 0.1
