"""From logits to a token: greedy, temperature, top-k, top-p.

The order is the usual one: temperature, then top-k, then top-p on what top-k left, renormalised.

B batch, W vocabulary.
"""

import math
import operator

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Sampling:
    """How tokens are chosen; make it with `make_sampling`.

    Values are traced, so that a change of temperature compiles nothing.
    """

    temperature: float
    top_k: int
    """W or more: no limit."""
    top_p: float
    greedy: bool = struct.field(pytree_node=False)
    filtered: bool = struct.field(pytree_node=False)
    """Whether top-k or top-p leaves anything out; without them logits need no sorting."""


def require_integer(name: str, value: object, *, lowest: int) -> int:
    """`value` as an int; bools and floats are refused.

    Raises:
      ValueError: not an integer, or below `lowest`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < lowest:
        raise ValueError(f"{name}={value!r}: must be an integer >= {lowest}")
    return number


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def make_sampling(*, temperature: float, top_k: int, top_p: float, vocab_size: int) -> Sampling:
    """Checked settings. temperature 0: greedy; top_k 0 and top_p 1: no limit.

    Raises:
      ValueError: a value outside of its range.
    """
    if not _is_number(temperature) or temperature < 0:
        raise ValueError(f"temperature={temperature!r}: must be a finite number >= 0")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p!r}: must be above 0 and at most 1")
    top_k = min(require_integer("top_k", top_k, lowest=0) or vocab_size, vocab_size)
    return Sampling(
        temperature=float(temperature),
        top_k=top_k,
        top_p=float(top_p),
        greedy=temperature == 0,
        filtered=top_k < vocab_size or top_p < 1,
    )


def keep_largest(logits_BW: jax.Array, descending_BW: jax.Array, counts_B: jax.Array) -> jax.Array:
    """-inf everywhere but at each row's `counts_B` (>= 1) largest logits; of equal ones the lower
    ids stay.

    `descending_BW`: the logits, sorted.
    """
    least_B1 = jnp.take_along_axis(descending_BW, counts_B[:, None] - 1, axis=-1)
    above_BW, level_BW = logits_BW > least_B1, logits_BW == least_B1
    places_B1 = counts_B[:, None] - above_BW.sum(-1, keepdims=True, dtype=jnp.int32)
    kept_BW = above_BW | (level_BW & (jnp.cumsum(level_BW, axis=-1) <= places_B1))
    return jnp.where(kept_BW, logits_BW, -jnp.inf)


def keep_likely(
    logits_BW: jax.Array, *, top_k: jax.Array | int, top_p: jax.Array | float
) -> jax.Array:
    """-inf everywhere but at the nucleus of the `top_k` largest logits: the fewest that together
    have at least `top_p` of their probability.
    """
    descending_BW = jnp.sort(logits_BW, axis=-1, descending=True)
    inside_1W = (jnp.arange(logits_BW.shape[-1]) < top_k)[None]
    share_BW = jax.nn.softmax(jnp.where(inside_1W, descending_BW, -jnp.inf), axis=-1)
    before_BW = jnp.cumsum(share_BW, axis=-1) - share_BW
    # A sum that rounds to 1 early must not cut the tail where top-p is off.
    in_nucleus_BW = (before_BW < top_p) | (jnp.asarray(top_p) >= 1)
    counts_B = (in_nucleus_BW & inside_1W).sum(-1, dtype=jnp.int32)
    return keep_largest(logits_BW, descending_BW, jnp.maximum(counts_B, 1))


def row_keys(seeds_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """The random key of each row's token at this position: a function of its seed and place
    only.
    """
    return jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(
        seeds_B, positions_B
    )


def choose(logits_BW: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """One token per row, int32 [B]; the lowest id where greedy meets equal logits."""
    if sampling.greedy:
        return jnp.argmax(logits_BW, axis=-1).astype(jnp.int32)
    # Largest logit at 0: a tiny temperature can't overflow.
    scaled_BW = (logits_BW - logits_BW.max(-1, keepdims=True)) / sampling.temperature
    if sampling.filtered:
        scaled_BW = keep_likely(scaled_BW, top_k=sampling.top_k, top_p=sampling.top_p)
    return jax.vmap(jax.random.categorical)(keys_B, scaled_BW).astype(jnp.int32)
