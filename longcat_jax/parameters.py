"""What a parameter is besides its value: logical axes, role, width. Initialisers live here.

A module declares each parameter on one line, `self.param(name, matrix(config, width, *axes),
shape)`. The initialiser returns the value boxed with what training needs to know about it, so there
is no second list of parameters: shapes, shardings, initial variances, learning rates and weight
decay all follow from `jax.eval_shape(init)`. Boxes live inside `init` only; a parameter tree holds
plain arrays.

Roles and width transfer (arXiv 2509.01322, section 3.1.1), s = fan-in / fan-in of the proxy:

  role       variance at init  learning rate       weight decay
  embedding  as the proxy's    as the proxy's      yes
  hidden     1/s               1/s                 yes (matrices of blocks, unembedding)
  router     1/s               1/s (x its factor)  yes
  norm       (ones)            as the proxy's      no
  bias       (zeros)           none: PID moves it  no
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta

from longcat_jax.config import ModelConfig, ProxyConfig

Initializer = Callable[..., "Box"]


class Box(struct.PyTreeNode, meta.AxisMetadata):
    """A parameter's value with its logical axes, role, and the config field its fan-in follows."""

    value: Any
    axes: tuple[str | None, ...] = struct.field(pytree_node=False)
    role: str = struct.field(pytree_node=False)
    width: str | None = struct.field(pytree_node=False, default=None)

    def unbox(self) -> Any:
        """The value (linen calls this)."""
        return self.value

    def replace_boxed(self, val: Any) -> "Box":
        """The same box around `val` (linen calls this)."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Box":
        """Not used: layers are stacked by `stack_layers`, not by linen's lifted transforms."""
        raise NotImplementedError

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Box":
        """Not used, see `add_axis`."""
        raise NotImplementedError


def is_box(node: Any) -> bool:
    """Leaf test for trees of boxes."""
    return isinstance(node, Box)


def master_dtype(config: ModelConfig) -> jnp.dtype:
    """Dtype of stored parameters: float32, or float64 where the model computes in it."""
    return jnp.promote_types(config.dtype, jnp.float32)


def _normal(config: ModelConfig, role: str, width: str | None, axes: tuple) -> Initializer:
    def init(key: jax.Array, shape: tuple[int, ...]) -> Box:
        value = config.initializer_range * jax.random.normal(key, shape, master_dtype(config))
        return Box(value, axes, role, width)

    return init


def matrix(config: ModelConfig, width: str, *axes: str | None) -> Initializer:
    """Normal(0, initializer_range) for a hidden matrix whose fan-in follows `config.<width>`."""
    return _normal(config, "hidden", width, axes)


def router_matrix(config: ModelConfig, *axes: str | None) -> Initializer:
    """As `matrix`, with the router's learning rate."""
    return _normal(config, "router", "hidden_size", axes)


def embedding(config: ModelConfig, *axes: str | None) -> Initializer:
    """Normal(0, initializer_range) for a lookup table; width does not enter."""
    return _normal(config, "embedding", None, axes)


def norm_weight(config: ModelConfig) -> Initializer:
    """Ones, replicated."""
    return lambda key, shape: Box(jnp.ones(shape, master_dtype(config)), (None,), "norm")


def router_bias(config: ModelConfig) -> Initializer:
    """Zeros, replicated; only the PID transform moves them."""
    return lambda key, shape: Box(jnp.zeros(shape, master_dtype(config)), (None,), "bias")


def stack_layers(boxed: Any) -> Any:
    """Marks the leading dim that `jax.vmap(module.init)` has put in front of every value."""
    return jax.tree.map(lambda b: b.replace(axes=("layer", *b.axes)), boxed, is_leaf=is_box)


def scale_variance(boxed: Any, model: ModelConfig, proxy: ProxyConfig) -> Any:
    """Divides each matrix' initial variance by its s (see the table above)."""

    def one(box: Box) -> Box:
        ratio = width_ratio(box, model, proxy)
        return box if ratio == 1 else box.replace(value=box.value * ratio**-0.5)

    return jax.tree.map(one, boxed, is_leaf=is_box)


def width_ratio(box: Box, model: ModelConfig, proxy: ProxyConfig) -> float:
    """s of one parameter; 1 for those that width doesn't scale."""
    return proxy.ratio(model, box.width) if box.width else 1.0


def unbox(boxed: Any) -> Any:
    """The tree of plain values."""
    return jax.tree.map(lambda b: b.value, boxed, is_leaf=is_box)


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves by their paths as hf/layout.py writes them: layers/mlp/router/classifier."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
