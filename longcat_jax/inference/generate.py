"""Continuing prompts: prefill and the decoding loop as one compiled program.

Prompts stand in one batch, padded on the right to a length out of a few, so that most calls compile
nothing. A row's result doesn't depend on the others: padding is never attended to, experts drop
nothing, random keys come from the row's own seed and position. (On Hopper the last bits of a sum
over experts may: in which order they are added depends on those in use, see skinny_ffn.)

B batch, T padded prompt length, N new tokens at most and a few more steps, D model, W vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longcat_jax.config import ModelConfig
from longcat_jax.data.tokenizer import Tokenizer, load_tokenizer
from longcat_jax.inference.cache import Cache, extend, prefill
from longcat_jax.inference.forward import check_tokens
from longcat_jax.inference.sampling import (
    Sampling,
    choose,
    make_sampling,
    require_integer,
    row_keys,
)
from longcat_jax.model import longcat
from longcat_jax.model.longcat import Model, Params
from longcat_jax.parallel import compiler

MIN_PROMPT_LENGTH = 16
"""Shortest padded prompt; the others are its doubles."""
CACHE_MULTIPLE = 64
"""Of a cache's capacity: Hopper's kernel (pallas_kernels/mla_decode) takes whole tiles."""
STRIDE = 4
"""Tokens between two looks at whether all rows have ended: at each one the host waits for the
device, and the device then for the host."""
MAX_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns, a list entry per prompt."""

    tokens: list[list[int]]
    """New ids only; the end id, where it came, included."""
    logprobs: list[list[float]]
    """Of these tokens under the model's own distribution: temperature 1, no top-k, no top-p."""
    texts: list[str] | None
    """The new tokens as text, special ones left out; None for a model without a tokenizer."""


@struct.dataclass
class Inputs:
    """Arrays of one call."""

    prompts: longcat.Sequence
    seeds_B: np.ndarray
    end_ids: np.ndarray
    sampling: Sampling
    limit: int
    """Tokens to make, at most N; traced."""


@struct.dataclass
class LoopState:
    """What decoding carries from token to token."""

    cache: Cache
    last_B: jax.Array
    """Newest token of each row, not in the cache yet."""
    step: jax.Array
    """Tokens made so far, some of them past the limit."""
    ended_B: jax.Array
    counts_B: jax.Array
    """Tokens of each row up to its end."""
    tokens_BN: jax.Array
    logprobs_BN: jax.Array


def _append(state: LoopState, inputs: Inputs, logits_BW: jax.Array) -> LoopState:
    """Chooses every row's next token."""
    keys_B = row_keys(inputs.seeds_B, state.cache.lengths_B)
    token_B = choose(logits_BW, keys_B, inputs.sampling)
    logprob_BW = jax.nn.log_softmax(logits_BW, axis=-1)
    logprob_B1 = jnp.take_along_axis(logprob_BW, token_B[:, None], axis=-1)
    ends_B = (token_B[:, None] == inputs.end_ids[None]).any(-1)
    place = (jnp.zeros_like(state.step), state.step)
    return LoopState(
        cache=state.cache,
        last_B=token_B,
        step=state.step + 1,
        ended_B=state.ended_B | ends_B,
        counts_B=state.counts_B + (~state.ended_B & (state.step < inputs.limit)),
        tokens_BN=jax.lax.dynamic_update_slice(state.tokens_BN, token_B[:, None], place),
        logprobs_BN=jax.lax.dynamic_update_slice(state.logprobs_BN, logprob_B1, place),
    )


def steps_run(tokens: int) -> int:
    """Decoding steps of so many tokens that no end id cuts short: whole strides after the first."""
    return -(-(tokens - 1) // STRIDE) * STRIDE


@functools.partial(
    jax.jit, static_argnames=("config", "max_new_tokens"), compiler_options=compiler.DECODING
)
def run(params: Params, inputs: Inputs, *, config: ModelConfig, max_new_tokens: int) -> LoopState:
    """The program: prefill, then a token per row and step until all have ended, and up to
    STRIDE - 1 steps more. No part of another jitted function: it has compiler options of its own.
    """
    params = longcat.decoding_params(params, config)  # once, not in every step
    B, T = inputs.prompts.tokens_BT.shape
    made = 1 + steps_run(max_new_tokens)  # at most
    capacity = -(-(T + made) // CACHE_MULTIPLE) * CACHE_MULTIPLE
    hidden_BTD, cache = prefill(params, config, inputs.prompts, capacity=capacity)
    last_B11 = cache.lengths_B[:, None, None] - 1
    logits_BW = longcat.unembed(params, jnp.take_along_axis(hidden_BTD, last_B11, axis=1)[:, 0])
    state = LoopState(
        cache=cache,
        last_B=jnp.zeros(B, jnp.int32),
        step=jnp.zeros((), jnp.int32),
        ended_B=jnp.zeros(B, bool),
        counts_B=jnp.zeros(B, jnp.int32),
        tokens_BN=jnp.zeros((B, made), jnp.int32),
        logprobs_BN=jnp.zeros((B, made), logits_BW.dtype),
    )

    def unfinished(state: LoopState) -> jax.Array:
        return (state.step < inputs.limit) & ~state.ended_B.all()

    def step(_: jax.Array, state: LoopState) -> LoopState:
        hidden_BTD, cache = extend(params, config, state.last_B[:, None], state.cache)
        logits_BW = longcat.unembed(params, hidden_BTD[:, 0])
        return _append(state.replace(cache=cache), inputs, logits_BW)

    def stride(state: LoopState) -> LoopState:
        return jax.lax.fori_loop(0, STRIDE, step, state)

    return jax.lax.while_loop(unfinished, stride, _append(state, inputs, logits_BW))


def _padded_length(longest: int) -> int:
    length = MIN_PROMPT_LENGTH
    while length < longest:
        length *= 2
    return length


def _pad(rows: list[np.ndarray]) -> longcat.Sequence:
    """[B, T] arrays of the prompts, segment 1, followed by padding, segment 0."""
    length = _padded_length(max(map(len, rows)))
    tokens = np.stack([np.pad(row, (0, length - len(row))) for row in rows])
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    lengths_B1 = np.array([[len(row)] for row in rows])
    return longcat.Sequence(tokens, positions, (positions < lengths_B1).astype(np.int32))


def _encode(prompts: Any, config: ModelConfig, tokenizer: Tokenizer | None) -> list[np.ndarray]:
    """int32 ids of every prompt."""
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise ValueError("prompts: must be a list of prompts, each a text or a list of token ids")
    rows = []
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ValueError(f"{name}: is text, but the model has no tokenizer; give token ids")
            ids = np.array([config.bos_token_id, *tokenizer.encode(prompt)])
        elif isinstance(prompt, Sequence | np.ndarray | jax.Array) and np.ndim(prompt) == 1:
            ids = np.asarray(prompt)
        else:
            raise ValueError(f"{name}: must be a text or a list of token ids")
        if not ids.size:
            raise ValueError(f"{name}: is empty")
        check_tokens(name, ids, config)
        rows.append(ids.astype(np.int32))
    if not rows:
        raise ValueError("prompts: must hold at least one prompt")
    return rows


def _seeds(seed: int | Sequence[int], num_rows: int) -> np.ndarray:
    single = not isinstance(seed, Sequence | np.ndarray)
    seeds = [seed] * num_rows if single else list(seed)
    if len(seeds) != num_rows:
        raise ValueError(f"seed: {len(seeds)} seeds for {num_rows} prompts")
    seeds = [require_integer("seed", s, lowest=0) for s in seeds]
    if max(seeds) > MAX_SEED:
        raise ValueError(f"seed={max(seeds)}: must be at most {MAX_SEED}")
    return np.array(seeds, np.uint32)


def _end_ids(eos: int | Sequence[int] | None, config: ModelConfig) -> np.ndarray:
    if eos is None:
        eos = config.eos_token_id
    ids = list(eos) if isinstance(eos, Sequence | np.ndarray) else [eos]
    # No id is -1: an empty list runs the same compiled program as a single id.
    return np.array([require_integer("eos", i, lowest=0) for i in ids] or [-1], np.int32)


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked call of `generate`, to be run once or more."""

    model: Model
    inputs: Inputs
    max_new_tokens: int
    tokenizer: Tokenizer | None

    def run(self, *, limit: int | None = None) -> Generation:
        """The result; with a limit only that many tokens of it, by the same compiled program."""
        limit = self.max_new_tokens if limit is None else min(limit, self.max_new_tokens)
        state = run(
            self.model.params,
            self.inputs.replace(limit=limit),
            config=self.model.config,
            max_new_tokens=self.max_new_tokens,
        )
        tokens_BN, logprobs_BN = np.asarray(state.tokens_BN), np.asarray(state.logprobs_BN)
        counts = np.asarray(state.counts_B).tolist()
        tokens = [row[:n].tolist() for row, n in zip(tokens_BN, counts, strict=True)]
        logprobs = [row[:n].tolist() for row, n in zip(logprobs_BN, counts, strict=True)]
        texts = [self.tokenizer.decode(row) for row in tokens] if self.tokenizer else None
        return Generation(tokens, logprobs, texts)


def make_request(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    eos: int | Sequence[int] | None = None,
) -> Request:
    """Checks the arguments of `generate` and lays the batch out.

    Raises:
      ValueError: as `generate`.
    """
    config = model.config
    max_new_tokens = require_integer("max_new_tokens", max_new_tokens, lowest=1)
    sampling = make_sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, vocab_size=config.vocab_size
    )
    tokenizer = load_tokenizer(model.tokenizer) if model.tokenizer else None
    rows = _encode(prompts, config, tokenizer)
    longest, positions = max(map(len, rows)), config.max_position_embeddings
    if longest + max_new_tokens > positions:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: with a prompt of {longest} tokens this passes the "
            f"model's max_position_embeddings={positions}"
        )
    inputs = Inputs(
        prompts=_pad(rows),
        seeds_B=_seeds(seed, len(rows)),
        end_ids=_end_ids(eos, config),
        sampling=sampling,
        limit=max_new_tokens,
    )
    return Request(model, inputs, max_new_tokens, tokenizer)


def generate(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 16,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    eos: int | Sequence[int] | None = None,
) -> Generation:
    """Continues every prompt until an end id or `max_new_tokens` new tokens.

    Compiled anew for another batch size, padded prompt length, `max_new_tokens`, and between
    greedy, plain and filtered sampling; for nothing else.

    Args:
      model: what `longcat_jax.load` returns.
      prompts: texts (the begin id is put in front; the model needs a tokenizer) or lists of ids,
        taken as they are.
      max_new_tokens: N, at least 1.
      temperature: 0: the likeliest token (the lowest id of equals); else logits are divided by it.
      top_k: choose among this many likeliest tokens only; 0: all.
      top_p: choose among the fewest likeliest tokens that hold this probability only; 1: all.
      seed: one for all rows (equal prompts then give equal samples) or one per row. A row's tokens
        depend on its seed and prompt, not on its batch.
      eos: end id or ids; None: the model's; (): never end early.

    Raises:
      ValueError: an argument outside of its range, an empty prompt, an id outside of the
        vocabulary, text without a tokenizer, or more tokens than the model has positions.
    """
    return make_request(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos=eos,
    ).run()
