"""The forward pass of a loaded model, compiled. B batch, T tokens."""

import functools

import jax
import numpy as np

from longcat_jax.config import ModelConfig
from longcat_jax.model import longcat
from longcat_jax.model.longcat import Model, Output, Params


def check_tokens(name: str, tokens: np.ndarray, config: ModelConfig) -> None:
    """Refuses what isn't a token id of the vocabulary: a lookup would clip it.

    Raises:
      ValueError: not integers, or an id outside of the vocabulary.
    """
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"{name}: must be integer token ids, not {tokens.dtype}")
    bad = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if bad.size:
        raise ValueError(
            f"{name}: token id {bad.flat[0]} is outside of the vocabulary (0 to "
            f"{config.vocab_size - 1})"
        )


@functools.partial(jax.jit, static_argnames=("config", "mtp"))
def _forward(params: Params, tokens_BT: jax.Array, *, config: ModelConfig, mtp: bool) -> Output:
    return longcat.forward(params, config, tokens_BT, mtp=mtp)


def forward(model: Model, tokens_BT: jax.Array, *, mtp: bool = False) -> Output:
    """Logits [B, T, W] and what else `Output` holds, of rows that are one sequence each.

    Args:
      model: what `longcat_jax.load` returns.
      tokens_BT: [B, T] token ids; an array or nested lists.
      mtp: the MTP head's logits too.

    Raises:
      ValueError: not [B, T] ids of the vocabulary, longer than the model's positions, or `mtp`
        asked of a model without the head.
    """
    tokens = np.asarray(tokens_BT)
    if tokens.ndim != 2 or tokens.size == 0:
        raise ValueError(f"tokens_BT: must be [B, T] and not empty, not of shape {tokens.shape}")
    check_tokens("tokens_BT", tokens, model.config)
    longest = model.config.max_position_embeddings
    if tokens.shape[1] > longest:
        raise ValueError(
            f"tokens_BT: {tokens.shape[1]} tokens a row; at most max_position_embeddings={longest}"
        )
    return _forward(model.params, tokens.astype(np.int32), config=model.config, mtp=mtp)
