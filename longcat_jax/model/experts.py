"""The real experts' arithmetic on one device: rows in order of expert, two grouped products, sum.

Gathers only, in both directions: rows are summed back through the inverse permutation in the order
of the selections. A gate scales its row between the two products, where it is narrow and where its
gradient is found without the rows' results: neither direction keeps or weighs rows as wide as the
model.

T tokens, D model, X experts here, F expert width, K selections, R rows of the grouped GEMM.
"""

import jax
import jax.numpy as jnp
from flax import struct

from longcat_jax.model.remat import keep, keep_if_ample
from longcat_jax.sharding import several_devices
from pallas_kernels import (
    gather_rows,
    gather_sum,
    grouped_gemm,
    grouped_swiglu,
    skinny_experts,
)
from pallas_kernels.skinny_ffn import reads_selected_experts

FEW_SLOTS = 1024
"""So many are put in order by comparing all pairs, and their rows left to XLA's fusions."""


@struct.dataclass
class Permutation:
    """Order of the computed (token, selection) slots by expert."""

    slot_of_row_R: jax.Array
    """t * K + k; T * K for rows that stay empty: they are not read."""
    row_of_slot_TK: jax.Array
    """R for slots that have no row."""
    group_sizes_X: jax.Array


def permute_by_expert(experts_TK: jax.Array, num_experts: int, num_rows: int) -> Permutation:
    """Stable order, so equal inputs give equal sums whatever the other tokens do.

    Ids from `num_experts` on have no row. Where more slots than `num_rows` want one, the first
    tokens' get it.
    """
    (T, K), slots = experts_TK.shape, experts_TK.size
    wants_S = (experts_TK < num_experts).reshape(-1)
    if num_rows < T * min(K, num_experts):
        wants_S &= jnp.cumsum(wants_S, dtype=jnp.int32) <= num_rows
    key_S = jnp.where(wants_S, experts_TK.reshape(-1), num_experts)
    if slots <= FEW_SLOTS:
        return _by_comparison(key_S, experts_TK.shape, num_experts, num_rows)
    narrow = jnp.uint16 if num_experts < 2**16 else jnp.int32  # a GPU sorts by 8 bits at a time
    order_S = jnp.argsort(key_S.astype(narrow), stable=True).astype(jnp.int32)
    sorted_S = key_S[order_S]
    place_S = jnp.arange(slots, dtype=jnp.int32)
    last_S = sorted_S != jnp.append(sorted_S[1:], -1)
    ends_X = jnp.zeros(num_experts, jnp.int32)
    ends_X = ends_X.at[jnp.where(last_S, sorted_S, num_experts)].set(place_S + 1, mode="drop")
    ends_X = jax.lax.cummax(ends_X)  # nobody's end is the one before
    row_R = place_S[:num_rows]
    slot_of_row_R = jnp.where(row_R < ends_X[-1], order_S[:num_rows], slots)
    row_of_slot = jnp.full(slots, num_rows, jnp.int32).at[slot_of_row_R].set(row_R, mode="drop")
    order = slot_of_row_R, row_of_slot.reshape(T, K), jnp.diff(ends_X, prepend=0)
    return Permutation(*map(keep, order))  # small, and made by a sort


def _by_comparison(
    key_S: jax.Array, shape: tuple[int, int], num_experts: int, num_rows: int
) -> Permutation:
    """The same of few slots: every pair is compared, in fewer kernels than a sort and what follows
    it. A decoding step waits for launches.
    """
    slots = len(key_S)
    place_S = jnp.arange(slots, dtype=jnp.int32)
    order_S = key_S * slots + place_S
    rank_S = (order_S[None] < order_S[:, None]).sum(1, dtype=jnp.int32)
    row_of_slot_S = jnp.where(key_S < num_experts, rank_S, num_rows)
    here_RS = row_of_slot_S[None] == place_S[:num_rows, None]
    slot_of_row_R = slots + jnp.where(here_RS, place_S[None] - slots, 0).sum(1, dtype=jnp.int32)
    expert_X = jnp.arange(num_experts, dtype=key_S.dtype)
    group_sizes_X = (key_S[None] == expert_X[:, None]).sum(1, dtype=jnp.int32)
    order = slot_of_row_R, row_of_slot_S.reshape(shape), group_sizes_X
    return Permutation(*map(keep, order))


def reads_in_place(x_TD: jax.Array, down_XFD: jax.Array) -> bool:
    """Whether so few tokens, mostly a decoding step's, on one device that they wait for weights: a
    kernel reads those of the selected experts where they lie, and nothing is put in order.
    """
    return not several_devices() and reads_selected_experts(x_TD, down_XFD)


def real_experts(
    x_TD: jax.Array,
    gates_TK: jax.Array,
    experts_TK: jax.Array,
    gate_up_XDF: jax.Array,
    down_XFD: jax.Array,
    *,
    num_rows: int | None = None,
) -> jax.Array:
    """sum_k gate_k * SwiGLU_k(x) over the selected experts with an id below X.

    Args:
      x_TD: tokens.
      gates_TK: weights of the selections.
      experts_TK: ids; a token selects an expert once.
      gate_up_XDF: gate half first.
      down_XFD: back to the width of tokens.
      num_rows: rows to compute at most; None: the most that can be asked for. What doesn't fit is
        left out of the sum (`permute_by_expert`).
    """
    num_experts, (T, K) = gate_up_XDF.shape[0], experts_TK.shape
    if num_rows is None and reads_in_place(x_TD, down_XFD):
        return skinny_experts(x_TD, gates_TK, experts_TK, gate_up_XDF, down_XFD)
    most = T * min(K, num_experts)
    num_rows = most if num_rows is None else min(num_rows, most)
    order = permute_by_expert(experts_TK, num_experts, num_rows)
    token_of_row_R = order.slot_of_row_R // K
    # Few rows go into fusions of XLA's with what stands beside them, a kernel of ours is a launch.
    few = "reference" if T * K <= FEW_SLOTS else None
    rows_RD = gather_rows(x_TD, token_of_row_R, order.row_of_slot_TK, implementation=few)
    wide_RF = keep(grouped_gemm(rows_RD, gate_up_XDF, order.group_sizes_X))
    slots = gates_TK.reshape(-1, 1), order.slot_of_row_R, order.row_of_slot_TK.reshape(-1, 1)
    gates_R1 = gather_rows(*slots, implementation="reference")  # numbers, not rows
    in_use = order.group_sizes_X.sum()
    narrow_RF = grouped_swiglu(wide_RF, gates_R1[:, 0], in_use, implementation=few)
    narrow_RF = keep_if_ample(narrow_RF)
    rows_RD = grouped_gemm(narrow_RF, down_XFD, order.group_sizes_X)
    return gather_sum(rows_RD, token_of_row_R, order.row_of_slot_TK)
