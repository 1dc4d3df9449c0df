"""Sizes of the Mosaic attention kernels, and which keys a tile of queries meets.

B batch, T tokens (queries), S keys, L padded to whole tiles, C chunks of 64 tokens, N tiles, K
blocks of keys.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

CHUNK = 64  # tokens of a warpgroup's part of a tile, the smallest M of a wgmma
TILE_BYTES = CHUNK * CHUNK * 2
PIECE = 64  # columns of a swizzled row of shared memory, 16 bits each
QUERY_ROWS = 2 * CHUNK  # queries of a CTA, in the forward and in their gradient
PADDING = QUERY_ROWS  # log-sum-exp and the like are kept for whole tiles of so many queries
SLOTS = 2  # tiles of P and of dS in shared memory in the gradient to the keys
MULTIPROCESSORS = 132  # of an H100, for the order of tiles alone
SCRATCH_BYTES = 9 << 28  # of tiles of dS that the backward keeps at a time
SHARED_MEMORY = 226 << 10  # bytes of a CTA, less what barriers and vectors take


@dataclasses.dataclass(frozen=True)
class Forward:
    """Sizes of the forward kernel.

    Attributes:
      block: keys of a block.
      stages: blocks in shared memory.
      q_registers: the queries are read from registers, not from shared memory.
    """

    block: int
    stages: int
    q_registers: bool


@dataclasses.dataclass(frozen=True)
class Backward:
    """Sizes of the kernel of the gradients to keys and values.

    Attributes:
      q_stages: chunks of queries in shared memory. The warpgroup that sums values asks for chunk
        t + 1 before the one that sums keys has let go of chunk t - 1: at least 3, and with no more
        it waits for all of a load.
      dout_stages: chunks of the gradient of the output there, at least 2: the warpgroup that sums
        values gives one back when it has seen the next chunk's queries, which come first.
      k_registers: the keys are read from registers, not from shared memory.
      v_registers: the values are.
    """

    q_stages: int
    dout_stages: int
    k_registers: bool
    v_registers: bool


def forward(width: int, value_width: int) -> Forward:
    """Sizes for keys and values of these widths."""

    def most_stages(block: int) -> int:
        queries = 2 * QUERY_ROWS * max(width, value_width)
        return (SHARED_MEMORY - queries) // (2 * block * (width + value_width))

    block = 128 if value_width <= 128 and most_stages(128) >= 2 else 64
    # Registers of a thread: sums, scores, weights and queries. Where the mask cuts, ids of segments
    # push some of them out for a while.
    registers = value_width // 2 + block // 2 + block // 4 + width // 4
    return Forward(block, min(most_stages(block), 256 // block), registers <= 208)


def backward(width: int, value_width: int) -> Backward:
    """Sizes for keys and values of these widths."""
    tiles = 2 * CHUNK // 2  # registers of a thread for a tile and the next one
    k_registers = value_width // 2 + tiles + width // 4 <= 176
    v_registers = width // 2 + tiles + value_width // 4 <= 192
    # P in two dtypes, dS, and keys and values.
    left = SHARED_MEMORY - 3 * SLOTS * TILE_BYTES
    left -= 2 * CHUNK * (width * (not k_registers) + value_width * (not v_registers))
    q_stage, dout_stage = 2 * CHUNK * width, 2 * CHUNK * value_width
    q_stages = 4 if 4 * q_stage + 3 * dout_stage <= left else 3
    dout_stages = min((left - q_stages * q_stage) // dout_stage, 4)
    assert dout_stages >= 2, (width, value_width)
    return Backward(q_stages, dout_stages, k_registers, v_registers)


def query_stages(width: int) -> int:
    """Chunks of keys in shared memory in the kernel of the gradient to the queries."""
    out, stage = 2 * QUERY_ROWS * width, 2 * CHUNK * width + 2 * TILE_BYTES
    return min((SHARED_MEMORY - out) // stage, 4)


class Segments(NamedTuple):
    """Who sees whom: ids, and two bounds for each tile, in blocks of the other side.

    For a tile of queries keys may be seen from block `end` on, and up to the diagonal all are from
    block `whole` on. For a tile of keys queries may see one before chunk `end`, and after the
    diagonal all see all before chunk `whole`.
    """

    queries_BL: jax.Array
    keys_BL: jax.Array
    end_BN: jax.Array
    whole_BN: jax.Array


class Heads(NamedTuple):
    """Heads of a call: `count` from first[0] on, None for 0."""

    first: jax.Array | None
    count: int


class Grid(NamedTuple):
    """CTAs in the order in which they start: tile after tile, each of `together` heads.

    Tiles differ in their work, and each head's are ordered from the longest to the shortest. Were
    they to start head after head, the longest of the last head would run when all else is done;
    tile after tile of all heads would need the keys and values of all in L2. So they start in sets
    of heads, the smallest sets whose average SM has about as much to do as the longest tile.
    """

    heads: int
    sets: int
    tiles: int
    together: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the axes of `sizes`."""
        return "set", "tile", "of_set"

    @property
    def sizes(self) -> tuple[int, ...]:
        """What `plgpu.kernel` takes."""
        return self.sets, self.tiles, self.together

    def place(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Batch, head and number of the tile, longest first, of this CTA."""
        which = lax.axis_index("set") * self.together + lax.axis_index("of_set")
        heads = jnp.int32(self.heads)
        return lax.div(which, heads), lax.rem(which, heads), lax.axis_index("tile")


def grid(batch: int, heads: int, tiles: int) -> Grid:
    """The order of `tiles` tiles of each head; their work grows in equal steps to the longest."""
    number = batch * heads
    wanted = 2 * MULTIPROCESSORS // (tiles + 1)
    together = next(n for n in range(1, number + 1) if number % n == 0 and n >= min(wanted, number))
    return Grid(heads, number // together, tiles, together)


def chunks(tokens: int) -> int:
    """Chunks of so many tokens, in pairs."""
    return pl.cdiv(tokens, PADDING) * 2


def chunks_ahead(offset: jax.Array | None) -> jax.Array | int:
    """Query chunk i sees keys up to chunk i + this."""
    return 0 if offset is None else lax.div(offset + CHUNK - 1, jnp.int32(CHUNK))


def num_tiles(queries: int, keys: int, offset: jax.Array | int | None) -> int:
    """Tiles of dS, 64 x 64, at most: query chunk i has those of the keys it sees."""
    n = chunks(queries)
    beyond = 0 if offset is None else pl.cdiv(keys - queries + PADDING, CHUNK)
    return n * (n + 1) // 2 + n * beyond


def heads_at_a_time(heads: int, tiles: int) -> int:
    """Heads whose dS the backward keeps at a time, each of so many tiles: a divisor of `heads`."""
    fitting = max(1, SCRATCH_BYTES // (tiles * TILE_BYTES))
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n <= fitting)


def tile_index(i: jax.Array, j: jax.Array, ahead: jax.Array | int) -> jax.Array:
    """Where the tile of query chunk i and key chunk j is: row after row, no gaps."""
    return lax.div(i * (i + 1), jnp.int32(2)) + i * ahead + j


def pad(ids_BT: jax.Array, multiple: int) -> jax.Array:
    """Ids of whole tiles; what is past the end has the last token's."""
    padding = -ids_BT.shape[1] % multiple
    return jnp.pad(ids_BT.astype(jnp.int32), ((0, 0), (0, padding)), mode="edge")


def _bounds(ids_BL: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Least and greatest id of every `rows` tokens."""
    tiled = ids_BL.reshape(ids_BL.shape[0], -1, rows)
    return tiled.min(axis=2), tiled.max(axis=2)


def _first_block(queries_BL: jax.Array, rows: int, keys_BL: jax.Array, block: int) -> jax.Array:
    """The first block of keys that each `rows` queries may see [B, N].

    Ids that lie between a tile's least and greatest count as its own: more may be visited than is
    seen, never less. For packed documents, whose ids don't come back, the bound is sharp.
    """
    low_BN, high_BN = _bounds(queries_BL, rows)
    low_BK, high_BK = _bounds(keys_BL, block)
    meets_BNK = (low_BN[:, :, None] <= high_BK[:, None]) & (low_BK[:, None] <= high_BN[:, :, None])
    return jnp.argmax(meets_BNK, axis=2).astype(jnp.int32)  # every query's own key meets it


def _mixed(
    first_BL: jax.Array, first_rows: int, second_BL: jax.Array, second_rows: int
) -> jax.Array:
    """Whether two tiles hold more than one id together."""
    low, high = _bounds(first_BL, first_rows)
    other_low, other_high = _bounds(second_BL, second_rows)
    return (low[:, :, None] != other_high[:, None]) | (high[:, :, None] != other_low[:, None])


def _ids(
    ids_BS: jax.Array, offset: jax.Array | None, num_queries: int, multiple: int
) -> tuple[jax.Array, jax.Array]:
    """Ids of the queries, which stand at `offset`, and of the keys, both padded."""
    queries_BT = ids_BS
    if offset is not None:  # padding queries may stand past the last key
        longer = jnp.pad(ids_BS, ((0, 0), (0, PADDING)), mode="edge")
        queries_BT = lax.dynamic_slice_in_dim(longer, offset[0], num_queries, axis=1)
    return pad(queries_BT, multiple), pad(ids_BS, multiple)


def of_queries(
    ids_BS: jax.Array | None, offset: jax.Array | None, num_queries: int, rows: int, block: int
) -> Segments | None:
    """Blocks of `block` keys that each `rows` queries meet."""
    if ids_BS is None:
        return None
    queries_BL, keys_BL = _ids(ids_BS, offset, num_queries, max(rows, block))
    mixed_BNK = _mixed(queries_BL, rows, keys_BL, block)
    tile_N, block_K = jnp.arange(mixed_BNK.shape[1]), jnp.arange(mixed_BNK.shape[2])
    place_N = (tile_N + 1) * rows + (0 if offset is None else offset[0])
    before_NK = block_K[None] * block < place_N[:, None]
    whole_BN = jnp.max(jnp.where(mixed_BNK & before_NK[None], block_K[None, None] + 1, 0), axis=2)
    end_BN = _first_block(queries_BL, rows, keys_BL, block)
    return Segments(queries_BL, keys_BL, end_BN, whole_BN.astype(jnp.int32))


def of_keys(
    ids_BS: jax.Array | None, offset: jax.Array | None, num_queries: int
) -> Segments | None:
    """Chunks of queries that meet each chunk of keys.

    They include all that of_queries(ids_BS, offset, num_queries, QUERY_ROWS, CHUNK) has: the
    gradient to the queries reads what the one to the keys has written.
    """
    if ids_BS is None:
        return None
    queries_BL, keys_BL = _ids(ids_BS, offset, num_queries, QUERY_ROWS)
    mixed_BNC = _mixed(keys_BL, CHUNK, queries_BL, CHUNK)
    tile_N, chunk_C = jnp.arange(mixed_BNC.shape[1]), jnp.arange(mixed_BNC.shape[2])
    place_N = tile_N * CHUNK - (0 if offset is None else offset[0])
    after_NC = (chunk_C[None] + 1) * CHUNK > place_N[:, None]
    chunk_BNC = jnp.broadcast_to(chunk_C, mixed_BNC.shape)
    whole_BN = jnp.min(jnp.where(mixed_BNC & after_NC[None], chunk_BNC, chunk_C.size), axis=2)
    first_BN = _first_block(queries_BL, QUERY_ROWS, keys_BL, CHUNK)
    first_BC = jnp.repeat(first_BN, QUERY_ROWS // CHUNK, axis=1)
    meets_BNC = first_BC[:, None] <= tile_N[None, :, None]
    end_BN = jnp.max(jnp.where(meets_BNC, chunk_BNC + 1, 0), axis=2)
    return Segments(queries_BL, keys_BL, end_BN.astype(jnp.int32), whole_BN.astype(jnp.int32))
