"""Parameters that training leaves alone, chosen by patterns on their paths."""

import difflib
import fnmatch
from typing import Any

import jax
import optax

from longcat_jax.config import ConfigError
from longcat_jax.optim.pid_bias import BIAS_PATH
from longcat_jax.parameters import by_path, is_box


def frozen_mask(boxed: Any, patterns: tuple[str, ...]) -> Any:
    """Tree of booleans: which parameters match one of `optim.freeze`'s patterns.

    Args:
      boxed: (possibly abstract) tree of boxes.
      patterns: as of a shell, matched against whole paths such as `layers/mlp/router/classifier`;
        `*` crosses `/`.

    Raises:
      ConfigError: a pattern that matches nothing.
    """
    paths, tree = list(by_path(boxed, is_box)), jax.tree.structure(boxed, is_leaf=is_box)
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            groups = sorted({f"*/{name}/*" for path in paths for name in path.split("/")[1:-1]})
            close = difflib.get_close_matches(pattern, [*paths, *groups], n=1, cutoff=0)
            raise ConfigError(
                f"optim.freeze={pattern!r}: matches no parameter; did you mean {close[0]!r}?"
            )
    frozen = [any(fnmatch.fnmatchcase(path, p) for p in patterns) for path in paths]
    return jax.tree.unflatten(tree, frozen)


def router_bias_frozen(frozen: Any) -> bool:
    """Whether the PID controller must keep off, too."""
    for name in BIAS_PATH:
        frozen = frozen[name]
    return frozen


def stop_frozen_gradients(params: Any, frozen: Any) -> Any:
    """`params`, through whose frozen leaves no gradient flows: XLA drops that work."""
    return jax.tree.map(lambda p, f: jax.lax.stop_gradient(p) if f else p, params, frozen)


def freeze(adam: optax.GradientTransformation, frozen: Any) -> optax.GradientTransformation:
    """Adam for the parameters that train, no update and no moments for the frozen ones.

      u_i <- 0 where frozen, adam(u)_i elsewhere

    Args:
      adam: the transform that keeps state for every parameter.
      frozen: tree of booleans like the parameters.
    """
    trained = jax.tree.map(lambda f: not f, frozen)
    return optax.chain(optax.masked(optax.set_to_zero(), frozen), optax.masked(adam, trained))
