"""The whole model: initialise it, run its trunk, read logits.

Layers are stacked on a leading dim by `jax.vmap(block.init)` and run by `lax.scan`. Parameters are
a plain dict (tree in docs/ARCHITECTURE.md); nothing is sown or mutated, everything a caller may
want is returned.

B batch, T tokens, D model, W vocabulary, L layers, K selections, U latent width, E router outputs.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from longcat_jax.config import ModelConfig, ParallelConfig, ProxyConfig
from longcat_jax.model.block import Block
from longcat_jax.model.dense import dense
from longcat_jax.model.embed import embed
from longcat_jax.model.mla import AttentionInput
from longcat_jax.model.mtp import MTPHead
from longcat_jax.model.norm import rms_norm
from longcat_jax.model.remat import rematerialised
from longcat_jax.model.rope import rope_table
from longcat_jax.model.router import (
    PARTS,
    RouterStatistics,
    product_parts,
    router_statistics,
)
from longcat_jax.parallel.context import natural
from longcat_jax.parameters import embedding, matrix, norm_weight, scale_variance, stack_layers
from longcat_jax.sharding import axis_size, constrain_activations, without_mesh

Params = dict[str, Any]


@struct.dataclass
class Sequence:
    """Tokens with their places. Packed rows hold several segments, each with positions of its
    own. On a mesh with a context axis tokens are in its order (parallel/context.py).
    """

    tokens_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    """1.. within a row; 0 marks padding."""

    @classmethod
    def whole_rows(cls, tokens_BT: jax.Array) -> "Sequence":
        """Rows that are one segment each."""
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        return cls(tokens_BT, positions, jnp.ones_like(tokens_BT))


@struct.dataclass
class TrunkOutput:
    """What comes out of the blocks."""

    hidden_BTD: jax.Array
    """After the final norm: what the unembedding and the MTP head read."""
    last_BTD: jax.Array
    """Before it: what the hidden z-loss reads."""
    routers: RouterStatistics
    """Every field with a leading L."""
    left_out_L: jax.Array
    """Selections that found no room on their way to an expert."""
    latents: tuple[jax.Array, jax.Array]
    """[L, B, T, U] of either attention: what a cache holds."""


@struct.dataclass
class Output:
    """What `forward` returns."""

    logits: jax.Array
    """[B, T, W] in at least float32."""
    mtp_logits: jax.Array | None
    """[B, T - 1, W]; row t predicts token t + 2."""
    selected_experts: jax.Array
    """[L, B, T, K]."""
    hidden: jax.Array
    """[B, T, D] after the final norm."""


def init(config: ModelConfig, key: jax.Array, proxy: ProxyConfig | None = None) -> Params:
    """Boxed parameters (parameters.py); `abstract` gives their shapes, axes and
    roles.
    """
    c, D = config, config.hidden_size
    key_embed, key_layers, key_head, key_mtp = jax.random.split(key, 4)
    x_BTD = jnp.zeros((1, 2, D), c.dtype)
    whole = Sequence.whole_rows(jnp.zeros((1, 2), jnp.int32))
    tokens = AttentionInput(rope_table(c, whole.positions_BT), whole.segment_ids_BT)
    layers = jax.vmap(lambda k: Block(c).init(k, x_BTD, tokens)["params"])
    boxed = {
        "embed_tokens": embedding(c, "vocab", None)(key_embed, (c.vocab_size, D)),
        "norm": norm_weight(c)(key_head, (D,)),
        "lm_head": matrix(c, "hidden_size", "embed", None)(key_head, (D, c.vocab_size)),
    }
    with without_mesh():  # linen runs the modules once, on a row that no mesh could cut
        boxed["layers"] = stack_layers(layers(jax.random.split(key_layers, c.num_layers)))
        if c.num_nextn_predict_layers:
            boxed["mtp"] = MTPHead(c).init(key_mtp, x_BTD, whole.tokens_BT, tokens)["params"]
    return scale_variance(boxed, c, proxy or ProxyConfig())


def abstract(config: ModelConfig, proxy: ProxyConfig | None = None) -> Params:
    """`init` as boxed shapes: nothing is allocated, and a model is traced once a process."""
    # With float64 switched off a float64 model's shapes would be others.
    return _abstract(config, proxy, bool(jax.config.jax_enable_x64))


@functools.lru_cache(maxsize=8)
def _abstract(config: ModelConfig, proxy: ProxyConfig | None, wide: bool) -> Params:
    del wide
    return jax.eval_shape(lambda key: init(config, key, proxy), jax.random.key(0))


def _attention_input(config: ModelConfig, sequence: Sequence) -> AttentionInput:
    table = rope_table(config, sequence.positions_BT)
    return AttentionInput(table, natural(sequence.segment_ids_BT))


def working_layers(params: Params, config: ModelConfig) -> Params:
    """The stacked layers in the dtype that blocks compute in; routers keep their own.

    Not converted in every layer: once for both passes, where training has not done it
    (`working_copies`), and gradients are stacked in that dtype, the one they are computed in.
    """
    layers = params["layers"]
    router = layers["mlp"]["router"]
    rest = {**layers, "mlp": {**layers["mlp"], "router": None}}
    cast = jax.tree.map(lambda w: w.astype(config.dtype), rest)
    return {**cast, "mlp": {**cast["mlp"], "router": router}}


def working_params(params: Params, config: ModelConfig) -> Params:
    """All parameters as the forward pass uses them, for loops that run it often."""
    rest = {name: tree for name, tree in params.items() if name != "layers"}
    cast = jax.tree.map(lambda w: w.astype(config.dtype), rest)
    return {**cast, "layers": working_layers(params, config)}


def working_copies(params: Params, config: ModelConfig) -> Params:
    """Blocks' weights in the dtype that blocks compute in, where that is not their own; None for
    all other parameters.

    Training keeps them beside its master weights. Routers compute in their own dtype. Tables, the
    final norm, the unembedding and the MTP head are used in the compute dtype too, but converted
    where they are used, and their gradients are float32.
    """
    working = {**params, "layers": working_layers(params, config)}
    return jax.tree.map(lambda p, w: None if w.dtype == p.dtype else w, params, working)


def with_copies(params: Params, copies: Params) -> Params:
    """`params` with `working_copies` in the place of what they are copies of."""
    return jax.tree.map(lambda p, copy: p if copy is None else copy, params, copies)


def decoding_params(params: Params, config: ModelConfig) -> Params:
    """`working_params`, with what a router's product makes of its weights."""
    working = working_params(params, config)
    layers, mlp = working["layers"], working["layers"]["mlp"]
    router = mlp["router"]
    if config.dtype == "bfloat16" and router["classifier"].dtype == jnp.float32:
        router = {**router, PARTS: product_parts(router["classifier"])}
    return {**working, "layers": {**layers, "mlp": {**mlp, "router": router}}}


def trunk(
    params: Params,
    config: ModelConfig,
    sequence: Sequence,
    *,
    parallel: ParallelConfig | None = None,
    balance_groups: int = 1,
    remat: str = "none",
    unroll: int = 1,
    router_shift_LE: jax.Array | None = None,
) -> TrunkOutput:
    """Embedding, blocks and final norm.

    Args:
      params: plain parameter tree.
      config: architecture.
      sequence: B rows of T tokens.
      parallel: how experts are reached on a mesh; None: the defaults.
      balance_groups: G of the balance loss (model/router.py).
      remat: activation policy, see model/remat.py.
      unroll: layers in one pass of the loop (`train.unroll`).
      router_shift_LE: zeros added to every p, to differentiate by; None: not added.
    """
    c, block = config, Block(config, parallel or ParallelConfig())
    tokens = _attention_input(c, sequence)
    valid_BT = sequence.segment_ids_BT != 0

    def layer(x_BTD: jax.Array, scanned: tuple) -> tuple:
        weights, shift_E = scanned
        x_BTD, out = block.apply({"params": weights}, x_BTD, tokens, shift_E)
        statistics = router_statistics(out.routing, valid_BT, config=c, groups=balance_groups)
        return constrain_activations(x_BTD), (statistics, out.left_out, out.latents)

    x_BTD = embed(params["embed_tokens"], sequence.tokens_BT, jnp.dtype(c.dtype))
    x_BTD, (routers, left_out_L, latents) = jax.lax.scan(
        rematerialised(layer, remat, in_loop=unroll == 1),
        constrain_activations(x_BTD),
        (working_layers(params, c), router_shift_LE),
        unroll=min(unroll, c.num_layers),
    )
    hidden_BTD = rms_norm(x_BTD, params["norm"], c.rms_norm_eps)
    return TrunkOutput(hidden_BTD, x_BTD, routers, left_out_L, latents)


def mtp_hidden(
    params: Params,
    config: ModelConfig,
    hidden_BTD: jax.Array,
    next_tokens_BT: jax.Array,
    sequence: Sequence,
) -> jax.Array:
    """MTP head's normed hidden states [B, T, D]; positions and segments are those of `sequence`."""
    tokens = _attention_input(config, sequence)
    apply = MTPHead(config).apply
    return apply({"params": params["mtp"]}, hidden_BTD, next_tokens_BT, tokens)[0]


def unembed(params: Params, hidden: jax.Array) -> jax.Array:
    """Logits [..., W] in at least float32."""
    head_DW = params["lm_head"].astype(hidden.dtype)
    return dense(hidden, head_DW, out_dtype=jnp.promote_types(hidden, jnp.float32))


def forward(
    params: Params, config: ModelConfig, tokens_BT: jax.Array, *, mtp: bool = False
) -> Output:
    """Logits of whole rows, without a cache.

    Raises:
      ValueError: `mtp` asked of a model without the head, or a mesh that cuts rows.
    """
    if axis_size("context") > 1:
        raise ValueError("forward: takes whole rows, the mesh cuts them over context")
    if mtp and "mtp" not in params:
        raise ValueError("mtp=True: this model has no MTP head (num_nextn_predict_layers=0)")
    sequence = Sequence.whole_rows(tokens_BT)
    out = trunk(params, config, sequence)
    mtp_logits = None
    if mtp:
        drafted = jax.tree.map(lambda x: x[:, :-1], sequence)
        hidden = mtp_hidden(params, config, out.hidden_BTD[:, :-1], tokens_BT[:, 1:], drafted)
        mtp_logits = unembed(params, hidden)
    selected = out.routers.selected_BTK
    return Output(unembed(params, out.hidden_BTD), mtp_logits, selected, out.hidden_BTD)


@dataclasses.dataclass(frozen=True)
class Model:
    """A model to run: what `longcat_jax.load` returns."""

    config: ModelConfig
    params: Params
    tokenizer: Path | None = None
    """Its tokenizer.json, where the checkpoint came with one."""
