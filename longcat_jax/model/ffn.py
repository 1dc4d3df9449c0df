"""Dense SwiGLU FFN. B batch, T tokens, D model, F ffn width."""

import flax.linen as nn
import jax

from longcat_jax.config import ModelConfig
from longcat_jax.model.dense import dense, swiglu
from longcat_jax.parameters import matrix


def ffn(
    x: jax.Array,
    gate_DF: jax.Array,
    up_DF: jax.Array,
    down_FD: jax.Array,
    *,
    summed: bool = True,
) -> jax.Array:
    """W_down(silu(W_gate x) * W_up x), or the terms of the last product (`products`)."""
    return dense(swiglu(x, gate_DF, up_DF), down_FD, summed=summed)


class FFN(nn.Module):
    """Parameters of `ffn`."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *, summed: bool = True) -> jax.Array:
        """[B, T, D] -> [B, T, D], or [S, B, T, D] terms of it."""
        c, dtype = self.config, x_BTD.dtype
        wide = (c.hidden_size, c.ffn_hidden_size)
        gate = self.param("gate_proj", matrix(c, "hidden_size", "embed", None), wide)
        up = self.param("up_proj", matrix(c, "hidden_size", "embed", None), wide)
        down = self.param("down_proj", matrix(c, "ffn_hidden_size", None, "embed"), wide[::-1])
        return ffn(x_BTD, gate.astype(dtype), up.astype(dtype), down.astype(dtype), summed=summed)
