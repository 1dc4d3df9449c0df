"""Equivalences of the whole model, in float64: loops, remat, packing, causality, permutation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.losses import sequence_of
from longcat_jax.model.block import Block
from longcat_jax.model.embed import embed
from longcat_jax.model.longcat import Sequence, mtp_hidden, trunk
from longcat_jax.model.mla import AttentionInput
from longcat_jax.model.norm import rms_norm
from longcat_jax.model.rope import rope_table
from tests.helpers import (
    TOKENS,
    exact,
    random_batch,
    random_params,
    relative_error,
    tiny_config,
    with_leaf,
)

EXACT = 1e-12


@pytest.fixture(autouse=True)
def _exact():
    with exact():
        yield


@pytest.fixture(scope="module")
def job():
    with exact():
        config = tiny_config()
        return config, random_params(config), random_batch(config, rows=3)


@functools.cache
def _run():
    """hidden, MTP hidden and selected experts of any rows; one compilation for each shape."""
    model = tiny_config().model

    @jax.jit
    def run(params, tokens, positions, segment_ids):
        sequence = Sequence(tokens[:, :-1], positions[:, :-1], segment_ids[:, :-1])
        out = trunk(params, model, sequence)
        mtp = mtp_hidden(params, model, out.hidden_BTD, tokens[:, 1:], sequence)
        return out.hidden_BTD, mtp, out.routers.selected_BTK

    return run


def _values(params, batch):
    return _run()(params, batch["tokens"], batch["positions"], batch["segment_ids"])


def test_scan_over_layers_equals_a_python_loop(job):
    config, params, batch = job
    model, sequence = config.model, sequence_of(batch)

    @jax.jit
    def loop(params):
        x = embed(params["embed_tokens"], sequence.tokens_BT, jnp.float64)
        table = rope_table(model, sequence.positions_BT)
        tokens = AttentionInput(table, sequence.segment_ids_BT)
        for layer in range(model.num_layers):
            weights = jax.tree.map(lambda w, i=layer: w[i], params["layers"])
            x, _ = Block(model).apply({"params": weights}, x, tokens)
        return x, rms_norm(x, params["norm"], model.rms_norm_eps)

    out = jax.jit(lambda p: trunk(p, model, sequence))(params)
    assert relative_error((out.last_BTD, out.hidden_BTD), loop(params)) <= EXACT


def test_packed_row_equals_each_of_its_segments_run_alone(job):
    _, params, batch = job
    hidden, mtp, _ = _values(params, batch)
    compared = 0
    for row in range(len(batch["tokens"])):
        for segment in (1, 2, 3):
            places = np.flatnonzero(batch["segment_ids"][row] == segment)
            places = places[places < TOKENS]
            if not len(places):
                continue
            # Put alone at the start of a row; what follows is padding.
            alone = {name: np.zeros((1, TOKENS + 1), np.int32) for name in batch}
            alone["tokens"][0, : len(places) + 1] = batch["tokens"][row, places[0] :][
                : len(places) + 1
            ]
            alone["segment_ids"][0, : len(places)] = 1
            alone["positions"][0, : len(places)] = np.arange(len(places))
            hidden_alone, mtp_alone, _ = _values(params, alone)
            count = len(places)
            assert relative_error(hidden[row, places], hidden_alone[0, :count]) <= EXACT
            assert relative_error(mtp[row, places], mtp_alone[0, :count]) <= EXACT
            compared += 1
    assert compared >= 7


def test_packing_is_seen_when_segment_ids_are_wrong(job):
    _, params, batch = job
    merged = {**batch, "segment_ids": np.ones_like(batch["segment_ids"])}
    assert relative_error(_values(params, merged)[0], _values(params, batch)[0]) > 1e-3


def test_causality_by_gradient_of_hidden_and_mtp(job):
    config, params, _ = job
    model, rng = config.model, np.random.default_rng(5)
    # Distinct tokens: then row v of the embedding's gradient belongs to one position.
    tokens = jnp.asarray(rng.permutation(model.vocab_size)[None, : TOKENS + 1], jnp.int32)
    sequence = Sequence.whole_rows(tokens[:, :-1])
    weights = rng.normal(size=model.hidden_size)

    def read(tables):
        main, drafts = tables
        p = {**params, "embed_tokens": main, "mtp": {**params["mtp"], "embed_tokens": drafts}}
        out = trunk(p, model, sequence)
        mtp = mtp_hidden(p, model, out.hidden_BTD, tokens[:, 1:], sequence)
        return jnp.stack([out.hidden_BTD[0] @ weights, mtp[0] @ weights])

    tables = params["embed_tokens"], params["mtp"]["embed_tokens"]
    main, drafts = jax.jit(jax.jacrev(read))(tables)
    main = np.abs(np.asarray(main)[:, :, tokens[0, :-1]]).max(-1)  # [hidden | mtp, t, s]
    drafts = np.abs(np.asarray(drafts)[:, :, tokens[0, 1:]]).max(-1)  # s is of token s + 1
    future = np.triu(np.ones((TOKENS, TOKENS), bool), k=1)
    for dependence in (main[0], main[1], drafts[1]):
        assert (dependence[future] == 0).all()
        assert (dependence[~future] > 0).all()
    assert (drafts[0] == 0).all()


ROUTER, BIAS, GATE_UP, DOWN = (
    f"layers/mlp/{name}"
    for name in (
        "router/classifier",
        "router/e_score_correction_bias",
        "experts/gate_up_proj",
        "experts/down_proj",
    )
)


def _permuted(params, order, *paths):
    axis = {ROUTER: 2, BIAS: 1, GATE_UP: 1, DOWN: 1}
    for path in paths:

        def change(leaf, axis=axis[path]):
            rest = np.arange(len(order), leaf.shape[axis])
            return np.take(leaf, np.concatenate([order, rest]), axis=axis)

        params = with_leaf(params, path, change)
    return params


def test_permuting_experts_with_their_router_columns_changes_ids_only(job):
    config, params, batch = job
    order = np.random.default_rng(2).permutation(config.model.n_routed_experts)
    hidden, mtp, selected = _values(params, batch)
    same = _values(_permuted(params, order, ROUTER, BIAS, GATE_UP, DOWN), batch)
    assert relative_error(same[:2], (hidden, mtp)) <= EXACT
    new_id = np.arange(config.model.num_router_outputs)
    new_id[order] = np.arange(len(order))
    np.testing.assert_array_equal(np.sort(same[2]), np.sort(new_id[np.asarray(selected)]))
    assert (np.asarray(same[2]) != np.asarray(selected)).any()


@pytest.mark.parametrize("paths", [(ROUTER, BIAS), (GATE_UP, DOWN), (GATE_UP,), (DOWN,), (BIAS,)])
def test_permuting_only_a_part_of_the_experts_parameters_changes_the_output(job, paths):
    config, params, batch = job
    order = np.roll(np.arange(config.model.n_routed_experts), 1)
    moved = _values(_permuted(params, order, *paths), batch)
    assert relative_error(moved[0], _values(params, batch)[0]) > 1e-3


def test_hidden_of_bfloat16_stays_near_float64(job):
    config, params, batch = job
    low = dataclasses.replace(config.model, dtype="bfloat16")
    out = jax.jit(lambda p: trunk(p, low, sequence_of(batch)))(
        jax.tree.map(lambda x: x.astype(np.float32), params)
    )
    assert out.hidden_BTD.dtype == jnp.bfloat16
    hidden, _, selected = _values(params, batch)
    # Tokens whose selection flipped in low precision are elsewhere altogether; most must not.
    same = (np.sort(out.routers.selected_BTK) == np.sort(selected)).all((0, 3))
    assert same.mean() > 0.5
    difference = np.abs(np.asarray(out.hidden_BTD, np.float64) - hidden)
    assert 1e-4 < np.median(difference[same]) < 3e-2
