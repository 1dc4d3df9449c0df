"""The router of LongCat-Flash on one GPU: what its parts take, beside the experts they choose.

    python -m experiments.bench.router [--rounds 8]

768 outputs, 12 selections, 512 real experts, width 6144. The experts' time is that of their
products at EXPERTS_FLOPS, 8 real ones per token.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import timing
from longcat_jax.model.experts import permute_by_expert
from longcat_jax.model.router import largest_one_by_one, wide_product

TOKENS = (8192, 32768)
OUTPUTS, SELECTED, REAL, WIDTH, HIDDEN = 768, 12, 512, 6144, 2048
REAL_PER_TOKEN, EXPERTS_FLOPS = 8, 650e12


def _plain_product(x_BTD: jax.Array, w_DE: jax.Array) -> jax.Array:
    return jnp.matmul(x_BTD.astype(w_DE.dtype), w_DE, precision=jax.lax.Precision.HIGHEST)


def _route(product: Callable, choose: Callable, x_BTD: jax.Array, w_DE: jax.Array) -> Any:
    """Product, softmax, selection and permutation."""
    p_BTE = jax.nn.softmax(product(x_BTD, w_DE), axis=-1)
    experts_TK = choose(p_BTE, SELECTED).reshape(-1, SELECTED)
    return p_BTE, permute_by_expert(experts_TK, REAL, experts_TK.size)


def _top_k(x_BTE: jax.Array, count: int) -> jax.Array:
    return jax.lax.top_k(x_BTE, count)[1]


def bench(tokens: int, rounds: int) -> None:
    """Prints the table of one number of tokens."""

    @jax.jit
    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        a, b, c = jax.random.split(key, 3)
        x_BTD = jax.random.normal(a, (1, tokens, WIDTH), jnp.bfloat16)
        w_DE = jax.random.normal(b, (WIDTH, OUTPUTS)) * WIDTH**-0.5
        return x_BTD, w_DE, jax.random.normal(c, (1, tokens, OUTPUTS)) * 1e-3

    def gradient(product: Callable, x_BTD: Any, w_DE: Any, dout_BTE: Any) -> Any:
        return jax.vjp(product, x_BTD, w_DE)[1](dout_BTE)

    x_BTD, w_DE, dout_BTE = draw(jax.random.key(0))
    p_BTE = jax.jit(lambda x, w: jax.nn.softmax(wide_product(x, w), axis=-1))(x_BTD, w_DE)
    experts_TK = jax.jit(_top_k, static_argnums=1)(p_BTE, SELECTED)[0]
    bind = functools.partial
    functions = {
        "whole": (bind(_route, wide_product, largest_one_by_one), (x_BTD, w_DE)),
        "whole, float32 product and XLA's top_k": (
            bind(_route, _plain_product, _top_k),
            (x_BTD, w_DE),
        ),
        "product": (wide_product, (x_BTD, w_DE)),
        "product in float32": (_plain_product, (x_BTD, w_DE)),
        "product, gradients": (bind(gradient, wide_product), (x_BTD, w_DE, dout_BTE)),
        "product in float32, gradients": (bind(gradient, _plain_product), (x_BTD, w_DE, dout_BTE)),
        "softmax": (bind(jax.nn.softmax, axis=-1), (p_BTE,)),
        "selection": (bind(largest_one_by_one, count=SELECTED), (p_BTE,)),
        "selection, XLA's top_k": (bind(_top_k, count=SELECTED), (p_BTE,)),
        "permutation": (
            bind(permute_by_expert, num_experts=REAL, num_rows=experts_TK.size),
            (experts_TK,),
        ),
    }
    compiled = timing.compile_all(functions)
    contenders = {n: timing.jax_contender(c, functions[n][1], 1) for n, c in compiled.items()}
    experts = 6 * tokens * REAL_PER_TOKEN * WIDTH * HIDDEN / EXPERTS_FLOPS
    seconds = timing.medians(contenders, rounds=rounds)
    rows = {n: [f"{1e3 * s:.3f}", f"{s / experts:.1%}"] for n, s in seconds.items()}
    timing.table(f"router, {tokens} tokens", ["ms", "of the experts' forward pass"], rows)


def main() -> None:
    """Parses the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    for tokens in TOKENS:
        bench(tokens, args.rounds)


if __name__ == "__main__":
    main()
