"""One optimizer step as a pure function: losses, gradients over micro-batches, update, metrics.

A micro-batch A of accumulation, B batch, T tokens, L layers, E router outputs, X real experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longcat_jax.config import Config, ParallelConfig
from longcat_jax.losses import (
    Batch,
    Denominators,
    LossTerms,
    RouterCounts,
    denominators,
    loss_terms,
    next_token_nats,
    sequence_of,
    target_masks,
    total_loss,
)
from longcat_jax.model import longcat
from longcat_jax.optim import schedules
from longcat_jax.optim.chain import make_optimizer
from longcat_jax.optim.frozen import frozen_mask, stop_frozen_gradients
from longcat_jax.parallel.compiler import compiler_options
from longcat_jax.parallel.expert import capacity, chosen
from longcat_jax.parameters import master_dtype, unbox
from longcat_jax.sharding import BATCH_AXES, parameter_shardings
from pallas_kernels import kernels

Metrics = dict[str, jax.Array]


def _with_its_kernels[**P_, R](traced: Callable[P_, R]) -> Callable[P_, R]:
    """The function, traced with the kernels that its `config` asks for."""

    @functools.wraps(traced)
    def run(*args: P_.args, **kwargs: P_.kwargs) -> R:
        with kernels(kwargs["config"].kernels):
            return traced(*args, **kwargs)

    return run


@struct.dataclass
class TrainState:
    """All that training changes."""

    step: jax.Array
    """Optimizer steps done, int32."""
    params: Any
    opt_state: Any
    copies: Any
    """`longcat.working_copies` of params, written with them."""

    def working(self) -> Any:
        """Parameters as forward and backward pass use them."""
        return longcat.with_copies(self.params, self.copies)


def abstract_boxes(config: Config) -> Any:
    """Parameters as boxed shapes: nothing is allocated."""
    return longcat.abstract(config.model, config.proxy)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """NamedSharding of every leaf of the state; moments and copies lie like their parameters."""
    boxed = abstract_boxes(config)
    tx, params = make_optimizer(config, boxed), parameter_shardings(boxed, mesh)
    replicated = NamedSharding(mesh, P())
    opt_state = optax.tree.map_params(
        tx,
        # A frozen parameter has no moments: its place in the state is masked.
        lambda moment, sharding: moment if _is_masked(moment) else sharding,
        jax.eval_shape(tx.init, unbox(boxed)),
        params,
        transform_non_params=lambda _: replicated,
        is_leaf=_is_masked,
    )
    copies = jax.eval_shape(lambda p: longcat.working_copies(p, config.model), unbox(boxed))
    copied = jax.tree.map(lambda own, copy: None if copy is None else own, params, copies)
    return TrainState(replicated, params, opt_state, copied)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
    boxed = abstract_boxes(config)
    shapes = jax.eval_shape(lambda params: _fresh_state(config, boxed, params), unbox(boxed))
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        shapes,
        state_shardings(config, mesh),
    )


def _fresh_state(config: Config, boxed: Any, params: Any) -> TrainState:
    tx = make_optimizer(config, boxed)
    copies = longcat.working_copies(params, config.model)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), copies)


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """A new run's state, made in place on the mesh; the same values on every mesh."""

    def make(key: jax.Array) -> TrainState:
        boxed = longcat.init(config.model, key, config.proxy)
        return _fresh_state(config, boxed, unbox(boxed))

    return jax.jit(make, out_shardings=state_shardings(config, mesh))(jax.random.key(config.seed))


def state_from_params(config: Config, mesh: Mesh, params: Any) -> TrainState:
    """A new run's state around given parameters of any dtype (fine-tuning): fresh optimizer, step
    0.
    """
    boxed = abstract_boxes(config)

    def make(given: Any) -> TrainState:
        master = jax.tree.map(lambda p, own: p.astype(own.dtype), given, unbox(boxed))
        return _fresh_state(config, boxed, master)

    return jax.jit(make, out_shardings=state_shardings(config, mesh))(params)


def resumed_state(
    config: Config, mesh: Mesh, *, step: jax.Array, params: Any, opt_state: Any
) -> TrainState:
    """A run's state from what its checkpoint holds, arrays as in `abstract_state`."""
    copy = jax.jit(
        lambda master: longcat.working_copies(master, config.model),
        out_shardings=state_shardings(config, mesh).copies,
    )
    return TrainState(step, params, opt_state, copy(params))


def _gradients(
    params: Any, config: Config, batch: Batch, totals: Denominators
) -> tuple[LossTerms, RouterCounts, Any]:
    patterns = config.optim.freeze
    frozen = frozen_mask(abstract_boxes(config), patterns) if patterns else None

    def objective(p: Any) -> tuple[jax.Array, tuple[LossTerms, RouterCounts]]:
        p = stop_frozen_gradients(p, frozen) if patterns else p
        terms, counts = loss_terms(p, config, batch, totals)
        return total_loss(terms, config), (terms, counts)

    (_, (terms, counts)), grads = jax.value_and_grad(objective, has_aux=True)(params)
    wide = master_dtype(config.model)
    return terms, counts, jax.tree.map(lambda grad: grad.astype(wide), grads)


def accumulated_gradients(
    params: Any, config: Config, batch: Batch
) -> tuple[LossTerms, RouterCounts, Any]:
    """Losses, counts and gradients of the global batch, summed over its micro-batches in order.

    Gradients have the dtype of master weights, whichever `params` have.
    """
    totals = denominators(batch, config)
    return _summed(
        lambda part: _gradients(params, config, part, totals), batch, config.train.accumulate
    )


def _summed(of_batch: Callable[[Batch], Any], batch: Batch, parts: int) -> Any:
    """`of_batch` of the micro-batches, summed in order."""
    if parts == 1:
        return of_batch(batch)

    def split(x: jax.Array) -> jax.Array:
        # Every micro-batch takes rows from all devices: row r goes to micro-batch r mod A.
        x_ABT = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        if jax.sharding.get_abstract_mesh().empty:
            return x_ABT
        return jax.lax.with_sharding_constraint(x_ABT, P(None, BATCH_AXES))

    def step(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_batch(part)), None

    micro = jax.tree.map(split, batch)
    shapes = jax.eval_shape(of_batch, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(step, zeros, micro)[0]


def router_metrics(counts: RouterCounts, config: Config) -> Metrics:
    """What the log says of the router (SPEC 3), from one step's counts."""
    real_LX = counts.load_LE[:, : config.model.n_routed_experts].astype(jnp.float32)
    max_load_L = real_LX.max(-1) / jnp.maximum(real_LX.mean(-1), 1e-9)
    of_count = counts.real_histogram.sum(0).astype(jnp.float32)
    share = of_count / jnp.maximum(of_count.sum(), 1)
    numbers = jnp.arange(len(of_count), dtype=jnp.float32)
    mean = (share * numbers).sum()
    return {
        "experts_per_token": mean,
        "experts_per_token_std": jnp.sqrt((share * (numbers - mean) ** 2).sum()),
        "max_load": max_load_L.max(),
        "max_load_mean": max_load_L.mean(),
        "selections_left_out": counts.left_out_L.sum(),
    }


@_with_its_kernels
def train_step(
    state: TrainState, batch: Batch, token_bytes_W: jax.Array, *, config: Config
) -> tuple[TrainState, Metrics]:
    """One optimizer step on a global batch of [B, T + 1] arrays.

    Args:
      state: donated by the caller.
      batch: tokens, segment_ids, positions.
      token_bytes_W: bytes of text that each token stands for (bits per byte).
      config: static.
    """
    terms, counts, grads = accumulated_gradients(state.working(), config, batch)
    tx = make_optimizer(config, abstract_boxes(config))
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params, load_LE=counts.load_LE)
        params = optax.apply_updates(state.params, updates)
        copies = longcat.working_copies(params, config.model)
    has_next, _ = target_masks(batch)
    text_bytes = jnp.where(has_next, token_bytes_W[batch["tokens"][:, 1:]], 0).sum()
    bits = terms.loss * has_next.sum() / jnp.log(2.0)
    metrics = {
        "loss": terms.loss,
        "loss_total": total_loss(terms, config),
        "mtp_loss": terms.mtp_loss,
        "balance_loss": terms.balance_loss,
        "z_loss": terms.z_loss,
        "bits_per_byte": bits / jnp.maximum(text_bytes, 1),
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedules.learning_rate(config.optim, config.train.steps)(state.step),
        "pid_mu": schedules.pid_gain(config.optim, config.train.steps)(state.step),
        **router_metrics(counts, config),
    }
    return TrainState(state.step + 1, params, opt_state, copies), metrics


def compile_train_step(config: Config, mesh: Mesh) -> Callable:
    """The jitted step: state donated, its shardings kept."""
    shardings = state_shardings(config, mesh)

    def step(state: TrainState, batch: Batch, token_bytes_W: jax.Array) -> tuple:
        return train_step(state, batch, token_bytes_W, config=config)

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options(
            mesh, deterministic=config.deterministic, loop=config.loops_over_layers
        ),
    )


@struct.dataclass
class EvaluationSums:
    """Sums over one validation batch."""

    nats: jax.Array
    targets: jax.Array
    text_bytes: jax.Array
    load_LE: jax.Array
    real_histogram: jax.Array


@_with_its_kernels
def evaluation_step(
    params: Any, batch: Batch, token_bytes_W: jax.Array, *, config: Config
) -> EvaluationSums:
    """Cross-entropy and router counts of one batch, no gradients.

    No selection is left out, whatever training does: what is measured depends neither on the mesh
    nor on capacities. As in training one micro-batch follows the other.
    """
    config = dataclasses.replace(config, parallel=with_room(config))
    return _summed(
        lambda part: _evaluation_sums(params, part, token_bytes_W, config),
        batch,
        config.train.accumulate,
    )


def with_room(config: Config) -> ParallelConfig:
    """Dropless, in as many chunks as keep the rows of a chunk within those of a training step that
    isn't.
    """
    parallel, mesh, train, model = config.parallel, config.mesh, config.train, config.model
    if chosen(parallel, mesh.expert)[1]:
        return parallel
    rows = train.global_batch // (mesh.batch_shards * train.accumulate)
    tokens = rows * train.sequence_length // mesh.context
    each = mesh.expert * min(model.moe_topk, model.n_routed_experts // mesh.expert)
    most = capacity(tokens // parallel.token_chunks, model, parallel)
    divisors = (number for number in range(1, tokens + 1) if tokens % number == 0)
    chunks = next((number for number in divisors if tokens // number * each <= most), tokens)
    return dataclasses.replace(parallel, dropless=True, token_chunks=chunks)


def _evaluation_sums(
    params: Any, batch: Batch, token_bytes_W: jax.Array, config: Config
) -> EvaluationSums:
    out = longcat.trunk(
        params,
        config.model,
        sequence_of(batch),
        parallel=config.parallel,
        balance_groups=config.optim.balance.groups,
    )
    has_next, _ = target_masks(batch)
    return EvaluationSums(
        nats=next_token_nats(params, config, batch, out).sum(),
        targets=has_next.sum(),
        text_bytes=jnp.where(has_next, token_bytes_W[batch["tokens"][:, 1:]], 0).sum(),
        load_LE=out.routers.load_E,
        real_histogram=out.routers.real_histogram.sum(0),
    )


@_with_its_kernels
def router_watch(params: Any, batch: Batch, *, config: Config) -> Metrics:
    """Per layer: mean pairwise cosine of the router's rows, and R_g (SPEC 3).

    R_g = |grad_P alpha L_LB| / |grad_P L_LM|, by differentiating both losses at a zero vector
    added to every token's p; it should stay under 0.1. Both are training's, with its capacities.
    """
    model = config.model
    zero_LE = jnp.zeros(
        (model.num_layers, model.num_router_outputs), jnp.promote_types(model.dtype, jnp.float32)
    )
    totals = denominators(batch, config)

    def both(shift_LE: jax.Array) -> tuple[jax.Array, jax.Array]:
        terms, _ = loss_terms(params, config, batch, totals, router_shift_LE=shift_LE)
        return terms.balance_loss, terms.loss

    (balance, lm), pull = jax.vjp(both, zero_LE)
    one, none = jnp.ones_like(lm), jnp.zeros_like(lm)
    (balance_LE,), (lm_LE,) = pull((one, none)), pull((none, one))
    w_LDE = params["layers"]["mlp"]["router"]["classifier"]
    unit_LDE = w_LDE / jnp.linalg.norm(w_LDE, axis=1, keepdims=True)
    cosine_L = (jnp.square(unit_LDE.sum(-1)).sum(-1) / model.num_router_outputs - 1) / (
        model.num_router_outputs - 1
    )
    ratio_L = jnp.linalg.norm(balance_LE, axis=-1) / jnp.linalg.norm(lm_LE, axis=-1)
    return {"router/cosine": cosine_L, "router/balance_ratio": ratio_L}
