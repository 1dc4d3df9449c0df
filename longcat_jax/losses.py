"""Training losses: next-token and MTP cross-entropy, balance loss, hidden z-loss (SPEC 2 to 4).

Every loss is a sum over its targets divided by their number in the whole global batch, known
before the backward pass: accumulation, mesh and pipeline don't change it.

B batch, T tokens (model input; batch arrays have T + 1), R = B * T rows, D model, W vocabulary,
V columns of a vocabulary chunk, L layers, E router outputs.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from longcat_jax.config import Config
from longcat_jax.model.longcat import Params, Sequence, TrunkOutput, mtp_hidden, trunk
from longcat_jax.parallel.context import zigzag
from longcat_jax.sharding import (
    DENSE,
    TOKENS,
    gather_parts,
    on_shards,
    scatter_sum,
    vary_with_tokens,
)

Batch = dict[str, jax.Array]
PIECES = 8  # of a row of logits


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _chunk_weights(
    head_DW: jax.Array, index: jax.Array, width: int, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights [D, V] of one chunk, its column ids [V] and first column. The last chunk is shifted
    left to stay inside the vocabulary.
    """
    start = jnp.minimum(index * width, head_DW.shape[1] - width)
    weights_DV = jax.lax.dynamic_slice_in_dim(head_DW, start, width, axis=1)
    weights_DV = gather_parts(weights_DV.astype(dtype), DENSE, dim=0)
    return weights_DV, start + jnp.arange(width), start


def _chunk_logits(
    hidden_RD: jax.Array, weights_DV: jax.Array, columns_V: jax.Array, index: jax.Array
) -> jax.Array:
    """Logits [R, V] of one chunk, -inf where a column belongs to the chunk before."""
    logits_RV = jnp.matmul(hidden_RD, weights_DV, preferred_element_type=_wide(hidden_RD))
    mine_1V = (columns_V >= index * len(columns_V))[None]
    return jnp.where(mine_1V, logits_RV, -jnp.inf)


def _scan_forward(
    hidden_RD: jax.Array, head_DW: jax.Array, targets_R: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
    """Log-sum-exp and target logit of every row, by an online softmax over chunks."""
    dtype, rows = _wide(hidden_RD), hidden_RD.shape[0]

    def step(carry: tuple, index: jax.Array) -> tuple:
        top_R, total_R, target_logit_R = carry
        weights_DV, columns_V, _ = _chunk_weights(head_DW, index, width, hidden_RD.dtype)
        logits_RV = _chunk_logits(hidden_RD, weights_DV, columns_V, index)
        new_top_R = jnp.maximum(top_R, logits_RV.max(-1))
        total_R = total_R * jnp.exp(top_R - new_top_R)
        total_R += jnp.exp(logits_RV - new_top_R[:, None]).sum(-1)
        is_target = (columns_V[None] == targets_R[:, None]) & jnp.isfinite(logits_RV)
        target_logit_R += jnp.where(is_target, logits_RV, 0).sum(-1)
        return (new_top_R, total_R, target_logit_R), None

    start = (jnp.full(rows, -jnp.inf, dtype), jnp.zeros(rows, dtype), jnp.zeros(rows, dtype))
    start = jax.tree.map(vary_with_tokens, start)
    chunks = jnp.arange(-(-head_DW.shape[1] // width))
    (top_R, total_R, target_logit_R), _ = jax.lax.scan(step, start, chunks)
    return top_R + jnp.log(total_R), target_logit_R


def online_log_sum_exp(x_RW: jax.Array) -> jax.Array:
    """Log-sum-exp of every row [R], reading x once (arXiv 1805.02867); NaN for a row with inf.

    Rows are reduced in pieces: a GPU has more to do at a time than there are rows.
    """
    lowest = jnp.asarray(jnp.finfo(x_RW.dtype).min, x_RW.dtype)

    def join(a: tuple, b: tuple) -> tuple:
        top = jnp.maximum(a[0], b[0])
        return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

    pieces = x_RW.reshape(x_RW.shape[0], math.gcd(x_RW.shape[1], PIECES), -1)
    start = lowest, jnp.zeros_like(lowest)
    top, total = jax.lax.reduce((pieces, jnp.ones_like(pieces)), start, join, (2,))
    return jax.nn.logsumexp(top + jnp.log(total), axis=1)


def _log_sum_exp(x_RW: jax.Array) -> jax.Array:
    """Of every row; on a CPU with the greatest first, where its exponentials are vectors."""
    by_max = functools.partial(jax.nn.logsumexp, axis=-1)
    return jax.lax.platform_dependent(x_RW, cpu=by_max, default=online_log_sum_exp)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
    hidden_RD: jax.Array, head_DW: jax.Array, targets_R: jax.Array, chunk: int
) -> jax.Array:
    """-log softmax(hidden @ head)[target] of every row [R], in at least float32 (nats).

    The vocabulary is walked in pieces of `chunk` columns, forward and backward (where the logits
    are made again), so that [R, W] never stands in memory; a chunk that has room for all of it
    says that it may, and the backward pass reads what the forward pass made. Inside of `on_shards`
    rows and head are a device's own part: a piece of the head is whole only while it is used.
    """
    lse_R, target_logit_R = _scan_forward(
        hidden_RD, head_DW, targets_R, min(chunk, head_DW.shape[1])
    )
    return lse_R - target_logit_R


def _cross_entropy_forward(
    hidden_RD: jax.Array, head_DW: jax.Array, targets_R: jax.Array, chunk: int
) -> tuple[jax.Array, tuple]:
    if chunk < head_DW.shape[1]:
        lse_R, target_logit_R = _scan_forward(hidden_RD, head_DW, targets_R, chunk)
        return lse_R - target_logit_R, (hidden_RD, head_DW, targets_R, lse_R, None)
    weights_DW = _chunk_weights(head_DW, jnp.int32(0), head_DW.shape[1], hidden_RD.dtype)[0]
    logits_RW = jnp.matmul(hidden_RD, weights_DW, preferred_element_type=_wide(hidden_RD))
    lse_R = _log_sum_exp(logits_RW)
    target_logit_R = jnp.take_along_axis(logits_RW, targets_R[:, None], axis=1)[:, 0]
    return lse_R - target_logit_R, (hidden_RD, head_DW, targets_R, lse_R, logits_RW)


def _cross_entropy_backward(chunk: int, residuals: tuple, dloss_R: jax.Array) -> tuple:
    hidden_RD, head_DW, targets_R, lse_R, logits_RW = residuals
    width = min(chunk, head_DW.shape[1])

    def step(carry: tuple, index: jax.Array) -> tuple:
        dhidden_RD, dhead_DW = carry
        weights_DV, columns_V, start = _chunk_weights(head_DW, index, width, hidden_RD.dtype)
        logits_RV = logits_RW  # where kept, that of the only chunk
        if logits_RV is None:
            logits_RV = _chunk_logits(hidden_RD, weights_DV, columns_V, index)
        # exp(-inf) = 0 for the columns of the chunk before; its target is not theirs either.
        mine = jnp.isfinite(logits_RV) & (columns_V[None] == targets_R[:, None])
        dlogits_RV = (jnp.exp(logits_RV - lse_R[:, None]) - mine) * dloss_R[:, None]
        dlogits_RV = dlogits_RV.astype(hidden_RD.dtype)
        wide = _wide(hidden_RD)
        dhidden_RD += jnp.matmul(dlogits_RV, weights_DV.T, preferred_element_type=wide)
        piece_DV = jnp.matmul(hidden_RD.T, dlogits_RV, preferred_element_type=wide)
        piece_DV = scatter_sum(piece_DV, DENSE, dim=0)
        piece_DV += jax.lax.dynamic_slice_in_dim(dhead_DW, start, width, axis=1)
        dhead_DW = jax.lax.dynamic_update_slice_in_dim(dhead_DW, piece_DV, start, axis=1)
        return (dhidden_RD, dhead_DW), None

    start = (
        vary_with_tokens(jnp.zeros(hidden_RD.shape, _wide(hidden_RD))),
        vary_with_tokens(jnp.zeros(head_DW.shape, _wide(hidden_RD))),
    )
    chunks = jnp.arange(-(-head_DW.shape[1] // width))
    (dhidden_RD, dhead_DW), _ = jax.lax.scan(step, start, chunks)
    return dhidden_RD.astype(hidden_RD.dtype), dhead_DW.astype(head_DW.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def hidden_z_sum(last_BTD: jax.Array, valid_BT: jax.Array) -> jax.Array:
    """sum over tokens of (log sum_i exp|z_i|)^2 of the last block's output (section 3.2)."""
    z_BTD = jnp.abs(last_BTD.astype(_wide(last_BTD)))
    return jnp.where(valid_BT, jax.nn.logsumexp(z_BTD, axis=-1) ** 2, 0).sum()


def target_masks(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Where position t has a target t + 1, and t + 2, in its own segment; bool [B, T] each."""
    ids = batch["segment_ids"]
    here, after, second = ids[:, :-1], ids[:, 1:], jnp.pad(ids[:, 2:], ((0, 0), (0, 1)))
    has_next = (after == here) & (here != 0)
    return has_next, has_next & (second == here)


@struct.dataclass
class Denominators:
    """Numbers of targets in the whole global batch, as floats."""

    targets: jax.Array
    mtp_targets: jax.Array
    tokens: jax.Array
    rows: jax.Array


def denominators(batch: Batch, config: Config) -> Denominators:
    """Counts over a global batch of [B, T + 1] arrays; at least 1 each."""
    dtype = jnp.promote_types(config.model.dtype, jnp.float32)

    def count(mask: jax.Array) -> jax.Array:
        return jnp.maximum(mask.sum(), 1).astype(dtype)

    has_next, has_second = target_masks(batch)
    valid = batch["segment_ids"][:, :-1] != 0
    return Denominators(
        count(has_next), count(has_second), count(valid), count(jnp.ones(len(valid), bool))
    )


@struct.dataclass
class LossTerms:
    """Parts of the training loss, each already divided by its global denominator."""

    loss: jax.Array
    """Next-token cross-entropy, nats per target: what `loss` means everywhere."""
    mtp_loss: jax.Array
    """Cross-entropy of the MTP head, before its weight."""
    balance_loss: jax.Array
    """alpha * balance loss, mean over rows, summed over layers."""
    z_loss: jax.Array
    """lambda * hidden z-loss."""


@struct.dataclass
class RouterCounts:
    """Per-layer counts that sum over micro-batches."""

    load_LE: jax.Array
    real_histogram: jax.Array
    """[L, K + 1]."""
    left_out_L: jax.Array
    """Selections without room on the way to their expert (parallel/expert.py)."""


def sequence_of(batch: Batch) -> Sequence:
    """The T tokens that the model runs on, in the order of the mesh."""
    names = ("tokens", "positions", "segment_ids")
    return Sequence(*(zigzag(batch[name][:, :-1]) for name in names))


def next_token_nats(params: Params, config: Config, batch: Batch, out: TrunkOutput) -> jax.Array:
    """Cross-entropy of every target [B, T] in the order of the mesh, 0 where there is none."""
    has_next, _ = target_masks(batch)
    targets_BT = zigzag(batch["tokens"][:, 1:])
    return _masked_nats(params, config, out.hidden_BTD, targets_BT, zigzag(has_next))


def _masked_nats(
    params: Params,
    config: Config,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
) -> jax.Array:
    def on_device(hidden_BTD: jax.Array, head_DW: jax.Array, targets_BT: jax.Array) -> jax.Array:
        rows_RD, chunk = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), config.train.vocab_chunk
        head_DW = vary_with_tokens(head_DW)
        with jax.named_scope("cross_entropy"):
            nats_R = cross_entropy(rows_RD, head_DW, targets_BT.reshape(-1), chunk)
        return nats_R.reshape(targets_BT.shape)

    nats_of = on_shards(on_device, (TOKENS, P(DENSE), TOKENS), TOKENS)
    return jnp.where(mask_BT, nats_of(hidden_BTD, params["lm_head"], targets_BT), 0)


def loss_terms(
    params: Params,
    config: Config,
    batch: Batch,
    totals: Denominators,
    *,
    router_shift_LE: jax.Array | None = None,
) -> tuple[LossTerms, RouterCounts]:
    """All losses of one (micro-)batch of [B, T + 1] arrays, and the router's counts."""
    optim, sequence = config.optim, sequence_of(batch)
    out = trunk(
        params,
        config.model,
        sequence,
        parallel=config.parallel,
        balance_groups=optim.balance.groups,
        remat=config.train.remat,
        unroll=config.train.unroll,
        router_shift_LE=router_shift_LE,
    )
    mtp_loss = jnp.zeros((), totals.targets.dtype)
    if config.model.num_nextn_predict_layers and optim.mtp_weight:
        _, has_second = target_masks(batch)
        next_BT = zigzag(batch["tokens"][:, 1:])
        hidden = mtp_hidden(params, config.model, out.hidden_BTD, next_BT, sequence)
        second_BT = zigzag(jnp.pad(batch["tokens"][:, 2:], ((0, 0), (0, 1))))
        nats = _masked_nats(params, config, hidden, second_BT, zigzag(has_second))
        mtp_loss = nats.sum() / totals.mtp_targets
    valid_BT = sequence.segment_ids_BT != 0
    terms = LossTerms(
        loss=next_token_nats(params, config, batch, out).sum() / totals.targets,
        mtp_loss=mtp_loss,
        balance_loss=optim.balance.alpha * out.routers.balance_B.sum() / totals.rows,
        z_loss=optim.z_weight * hidden_z_sum(out.last_BTD, valid_BT) / totals.tokens,
    )
    return terms, RouterCounts(out.routers.load_E, out.routers.real_histogram, out.left_out_L)


def total_loss(terms: LossTerms, config: Config) -> jax.Array:
    """What is minimised."""
    weighted_mtp = config.optim.mtp_weight * terms.mtp_loss
    return terms.loss + weighted_mtp + terms.balance_loss + terms.z_loss
