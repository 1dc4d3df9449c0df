"""The train step: golden losses, accumulation, remat, compiled program, metrics, router watch."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.losses import RouterCounts, cross_entropy, denominators, loss_terms, target_masks
from longcat_jax.optim import schedules
from longcat_jax.parameters import by_path
from longcat_jax.sharding import make_mesh
from longcat_jax.train_step import (
    abstract_state,
    compile_train_step,
    evaluation_step,
    init_state,
    resumed_state,
    router_metrics,
    router_watch,
    state_from_params,
    train_step,
)
from pallas_kernels import HOPPER, made_for
from tests.helpers import (
    BATCH,
    TOKENS,
    exact,
    random_batch,
    random_params,
    relative_error,
    tiny_config,
    token_bytes,
    trained,
)

BIAS = ("layers", "mlp", "router", "e_score_correction_bias")
# Losses of the first steps on random batches. They change only when training does: then say so in
# the change that moves them.
GOLDEN_LOSSES = (4.6243954966, 4.8491483521, 4.1137546666, 4.5204467266, 3.7385102715)
GOLDEN_TOTALS = (9.0267898543, 9.2233511818, 7.8268262819, 8.2848841331, 7.0730498091)


@pytest.fixture(autouse=True)
def _exact():
    with exact():
        yield


def _bias(state):
    return functools.reduce(lambda tree, name: tree[name], BIAS, state.params)


def test_golden_losses_of_the_first_steps():
    metrics = trained().losses
    np.testing.assert_allclose([m["loss"] for m in metrics], GOLDEN_LOSSES, rtol=1e-9)
    np.testing.assert_allclose([m["loss_total"] for m in metrics], GOLDEN_TOTALS, rtol=1e-9)


@pytest.mark.parametrize(
    ("accumulate", "remat", "unroll"),
    [
        pytest.param(2, "selective", 1, marks=pytest.mark.slow),
        pytest.param(2, "full", 2, marks=pytest.mark.slow),
        (4, "ample", 2),
    ],
)
def test_accumulation_remat_and_unrolling_change_no_loss_gradient_or_bias(
    accumulate, remat, unroll
):
    config = tiny_config(train={"accumulate": accumulate})
    targets = target_masks(random_batch(config))[0].sum(-1).reshape(-1, accumulate).sum(0)
    assert len(set(targets.tolist())) > 1, "micro-batches must differ in their number of targets"
    whole, parts = trained(), trained(accumulate=accumulate, remat=remat, unroll=unroll)
    for a, b in zip(parts.losses, whole.losses, strict=True):
        assert relative_error(a, b) <= 1e-11
    # Adam's first moment is the gradient of the first step, times 1 - beta1.
    first = [run.states[0].opt_state for run in (parts, whole)]
    assert relative_error(*first) <= 1e-12
    assert relative_error(parts.states[-1], whole.states[-1]) <= 1e-10


@pytest.fixture(scope="module")
def evaluated():
    with exact():
        config = tiny_config()
        run = jax.jit(functools.partial(evaluation_step, config=config))
        return jax.device_get(run(random_params(config), random_batch(config), token_bytes(config)))


def test_router_bias_takes_exactly_one_paper_step_per_optimizer_step(evaluated):
    config = tiny_config()
    start = functools.reduce(lambda tree, name: tree[name], BIAS, random_params(config))
    delta = _bias(trained().states[0]) - start
    batch, model = random_batch(config), config.model
    N, tokens = model.n_routed_experts, (batch["segment_ids"][:, :-1] != 0).sum()
    share = evaluated.load_LE[:, :N] / (model.moe_topk * tokens)
    error = model.moe_topk_real / model.moe_topk / N - share
    np.testing.assert_allclose(delta[:, :N], config.optim.pid.mu * error, rtol=1e-6)
    assert (start[:, N:] != 0).all(), "identity experts' imported biases are there, and stay"
    np.testing.assert_array_equal(delta[:, N:], 0)


def test_counts_are_the_selections_of_tokens_outside_of_padding(evaluated):
    config = tiny_config()
    model = config.model
    tokens = (random_batch(config)["segment_ids"][:, :-1] != 0).sum()
    np.testing.assert_array_equal(evaluated.load_LE.sum(-1), [tokens * model.moe_topk] * 2)
    assert evaluated.real_histogram.sum() == tokens * model.num_layers
    real = evaluated.load_LE[:, : model.n_routed_experts].sum()
    assert evaluated.real_histogram @ np.arange(model.moe_topk + 1) == real
    metrics = trained().losses[0]["experts_per_token"]
    assert metrics == pytest.approx(real / tokens / model.num_layers, rel=1e-6)


def test_evaluation_reads_the_same_loss_as_training(evaluated):
    metrics = trained().losses[0]
    assert evaluated.nats / evaluated.targets == pytest.approx(metrics["loss"], rel=1e-12)
    bits = evaluated.nats / np.log(2) / evaluated.text_bytes
    assert bits == pytest.approx(metrics["bits_per_byte"], rel=1e-12)


def test_the_same_step_twice_is_bit_equal():
    state, metrics = trained().run(random_batch(tiny_config()))
    assert metrics == trained().losses[0]
    again = jax.device_get(state)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(trained().states[0]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bits_per_byte_is_nats_over_ln_2_and_the_bytes_of_the_targets():
    config, batch = tiny_config(), random_batch(tiny_config())
    ids = batch["segment_ids"]
    has_next = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] != 0)
    num_bytes = token_bytes(config)[batch["tokens"][:, 1:]][has_next].sum()
    metrics = trained().losses[0]
    wanted = metrics["loss"] * has_next.sum() / np.log(2) / num_bytes
    assert metrics["bits_per_byte"] == pytest.approx(wanted, rel=1e-12)


def test_metrics_are_finite_and_complete():
    names = {"loss", "loss_total", "mtp_loss", "balance_loss", "z_loss", "bits_per_byte"}
    names |= {"grad_norm", "experts_per_token", "experts_per_token_std"}
    names |= {"max_load", "max_load_mean", "selections_left_out", "learning_rate", "pid_mu"}
    optim, steps = tiny_config().optim, tiny_config().train.steps
    for index, step in enumerate(trained().losses):
        metrics = dict(step)
        rate = schedules.learning_rate(optim, steps)(index)
        assert metrics["learning_rate"] == pytest.approx(float(rate), rel=1e-12)
        assert metrics["pid_mu"] == pytest.approx(float(schedules.pid_gain(optim, steps)(index)))
        assert set(metrics) == names
        assert metrics.pop("selections_left_out") == 0
        assert all(np.isfinite(value) and value > 0 for value in metrics.values())


def test_router_metrics_of_a_hand_computed_case():
    config = tiny_config()
    load = np.zeros((2, 17), np.int32)
    load[0, :8] = [8, 0, 0, 0, 0, 0, 0, 8]  # mean 2, max 8
    load[1, :8] = [3, 3, 3, 3, 3, 3, 3, 3]
    load[:, 8:] = 100  # identity experts don't enter
    histogram = np.array([[1, 0, 0, 0, 1], [0, 0, 2, 0, 0]])
    counts = RouterCounts(jnp.asarray(load), jnp.asarray(histogram), jnp.asarray([3, 4]))
    out = router_metrics(counts, config)
    assert out["selections_left_out"] == 7
    assert float(out["max_load"]) == 4 and float(out["max_load_mean"]) == 2.5
    assert float(out["experts_per_token"]) == 2
    assert float(out["experts_per_token_std"]) == pytest.approx(2**0.5)


def test_the_step_learns_and_counts():
    config, losses = tiny_config(), trained().losses
    assert [int(state.step) for state in trained().states] == [1, 2, 3, 4, 5]
    # Steps 0, 2 and 4 see one batch.
    assert losses[4]["loss_total"] < losses[2]["loss_total"] < losses[0]["loss_total"]
    moved = jax.tree.map(
        lambda new, old: bool((new != old).any()), trained().states[0].params, random_params(config)
    )
    assert jax.tree.all(moved), "every parameter moves"
    assert trained().kept


# The compiled program.


def _float_scatters(text):
    """Scatters of floats in the text of a lowered or a compiled program."""
    compiled = re.findall(r"= (?:bf16|f\d+)\S* scatter\(", text)
    blocks = re.findall(r'"?stablehlo\.scatter"?.*?\}\) : \((tensor<[^)]*)\)', text, re.DOTALL)
    return compiled + [types for types in blocks if re.search(r"x(bf16|f\d+)>", types)]


def _logits(text, rows):
    """Arrays in which all rows meet the whole vocabulary."""
    places = "|".join((f"{BATCH},{TOKENS}", str(rows)))
    compiled = re.findall(rf"\w+\[(?:(?:{places}),44|44,(?:{places}))\]", text)
    lowered = places.replace(",", "x")
    return compiled + re.findall(rf"tensor<(?:(?:{lowered})x44|44x(?:{lowered}))x\w+>", text)


def test_no_float_scatter_in_the_step():
    assert _float_scatters(trained().lowered) == []
    assert _float_scatters(trained().compiled) == []
    # The same search finds one where there is one.
    table, ids = jnp.zeros((44, 24)), jnp.zeros(BATCH * TOKENS, jnp.int32)
    naive = jax.jit(jax.grad(lambda table: (table[ids] ** 2).sum())).lower(table)
    assert len(_float_scatters(naive.as_text())) == 1
    assert len(_float_scatters(naive.compile().as_text())) == 1


def test_no_array_of_all_rows_and_the_whole_vocabulary_in_the_step():
    rows = BATCH * TOKENS
    assert _logits(trained().lowered, rows) == []
    assert _logits(trained().compiled, rows) == []
    hidden, head = jnp.zeros((rows, 24)), jnp.zeros((24, 44))
    loss = jax.jit(lambda h, w: cross_entropy(h, w, jnp.zeros(rows, jnp.int32), 44))
    assert _logits(loss.lower(hidden, head).as_text(), rows)
    assert _logits(loss.lower(hidden, head).compile().as_text(), rows)


# In bfloat16.


def _assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((first, second)))


def _bfloat16_start(*, accumulate=1):
    """Config, mesh and state of the tiny job in bfloat16, without the MTP head."""
    model = {"dtype": "bfloat16", "num_nextn_predict_layers": 0}
    config = tiny_config(model=model, train={"accumulate": accumulate})
    mesh = make_mesh(config.mesh)
    return config, mesh, state_from_params(config, mesh, random_params(config))


@pytest.fixture(scope="module")
def bfloat16_run():
    """Two steps from one start, twice: states and metrics after them."""

    def run():
        state, metrics = state_from_params(config, mesh, random_params(config)), None
        for _ in range(2):
            state, metrics = step(state, batch, token_bytes(config))
        return jax.device_get((state, metrics))

    with exact():
        config, mesh, _ = _bfloat16_start()
        step, batch = compile_train_step(config, mesh), random_batch(config)
        return run(), run()


def test_a_bfloat16_step_keeps_float32_state_is_bit_repeatable_and_near_the_float64_loss(
    bfloat16_run,
):
    first, second = bfloat16_run
    _assert_same(first, second)
    state, metrics = first
    kept = state.step, state.params, state.opt_state
    floats = [x.dtype for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {np.dtype(np.float32)}
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(first))
    assert metrics["loss"] == pytest.approx(trained().losses[0]["loss"], rel=0.1)


def _assert_copies(state):
    """Blocks' weights, routers left out, are the parameters in bfloat16."""
    params = by_path(jax.device_get(state.params))
    copies = by_path(jax.device_get(state.copies))
    assert set(copies) == {p for p in params if p.startswith("layers/") and "/router/" not in p}
    for path, copy in copies.items():
        assert copy.dtype == jnp.bfloat16
        np.testing.assert_array_equal(copy, params[path].astype(copy.dtype), err_msg=path)


def test_copies_are_those_of_the_parameters_at_a_start_after_steps_and_after_a_restore(
    bfloat16_run,
):
    config, mesh, start = _bfloat16_start()
    state = bfloat16_run[0][0]
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), random_params(config))
    kept = dict(step=state.step, params=state.params, opt_state=state.opt_state)
    resumed = resumed_state(config, mesh, **kept)
    for one in (start, init_state(config, mesh), state_from_params(config, mesh, narrow), resumed):
        _assert_copies(one)
    _assert_copies(state)
    _assert_same(resumed, state)
    assert not jax.tree.leaves(trained().states[0].copies), "float64 computes with the parameters"


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_step_from_copies_is_that_from_the_parameters_bit_for_bit(accumulate):
    config, _, state = _bfloat16_start(accumulate=accumulate)
    step = jax.jit(functools.partial(train_step, config=config))
    rest = random_batch(config), token_bytes(config)
    converting = dataclasses.replace(state, copies=jax.tree.map(lambda _: None, state.params))
    found = step(state, *rest)
    _assert_same(found, step(converting, *rest))
    other = dataclasses.replace(state, copies=jax.tree.map(jnp.zeros_like, state.copies))
    assert step(other, *rest)[1]["loss"] != found[1]["loss"], "copies are what is computed with"


# Router watch.


@pytest.mark.slow
def test_router_watch_ratio_equals_finite_differences_and_cosine_brute_force():
    config = tiny_config(model={"num_nextn_predict_layers": 0})
    params, batch = random_params(config), random_batch(config, rows=3)
    watch = jax.jit(lambda p, b: router_watch(p, b, config=config))(params, batch)
    totals = denominators(batch, config)

    @jax.jit
    def losses(shift):
        terms, _ = loss_terms(params, config, batch, totals, router_shift_LE=shift)
        return jnp.stack([terms.balance_loss, terms.loss])

    h, shape = 1e-6, (config.model.num_layers, config.model.num_router_outputs)
    gradient = np.zeros((2, *shape))
    for place in np.ndindex(shape):
        shift = np.zeros(shape)
        shift[place] = h
        gradient[:, *place] = (losses(shift) - losses(-shift)) / (2 * h)
    balance, lm = np.linalg.norm(gradient, axis=-1)
    assert (balance > 1e-3).all() and (lm > 1e-3).all()
    np.testing.assert_allclose(watch["router/balance_ratio"], balance / lm, rtol=1e-6)

    for layer, classifier in enumerate(params["layers"]["mlp"]["router"]["classifier"]):
        rows = (classifier / np.linalg.norm(classifier, axis=0)).T
        pairs = [a @ b for i, a in enumerate(rows) for b in rows[:i]]
        assert watch["router/cosine"][layer] == pytest.approx(np.mean(pairs), rel=1e-10)


def test_a_job_may_ask_for_the_reference_kernels():
    widths = dict(qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64)
    model = dict(num_layers=1, expert_ffn_hidden_size=64, dtype="bfloat16", **widths)

    def traced(function, kind):
        config = tiny_config(model=model, kernels=kind)
        state, batch = abstract_state(config, make_mesh(config.mesh)), random_batch(config)
        first = state if function is train_step else state.params
        rest = (token_bytes(config),) if function is not router_watch else ()
        with made_for(HOPPER):
            run = functools.partial(function, config=config)
            return str(jax.make_jaxpr(run)(first, batch, *rest))

    text = traced(evaluation_step, "auto")
    assert "flash_mla_forward" in text and "mpmd_map" in text
    for function in (train_step, evaluation_step, router_watch):
        assert "mpmd_map" not in traced(function, "reference")
