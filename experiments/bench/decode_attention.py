"""Absorbed MLA decode on one Hopper GPU: cache bytes per second by shape, in one process.

    python -m experiments.bench.decode_attention [--rounds 8]

Every shape is timed beside a copy of its cache (read and written, so the bandwidth that there is),
the reference in XLA and, where torch is installed, torch's scaled_dot_product_attention. Caches are
larger than L2 together. "ragged": lengths uniform between an eighth of the cache and all of it.
"""

import argparse
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from pallas_kernels import mla_decode
from pallas_kernels.mla_decode import shapes

SCALE = 192**-0.5
PAGE = 64
OPERANDS_BYTES = 6e8  # of all operand sets together, at least
CHECKED_ENTRIES = 1024


@functools.partial(jax.jit, static_argnums=1)
def _draw(key: jax.Array, shape: shapes.Shape) -> tuple[jax.Array, jax.Array]:
    a, b = jax.random.split(key)
    width = shape.latent + shape.rope
    q = jax.random.normal(a, (shape.batch, shape.tokens, shape.heads, width), jnp.bfloat16)
    return q, jax.random.normal(b, (shape.batch, shape.entries, width), jnp.bfloat16)


def _cache_bytes(shape: shapes.Shape, lengths: np.ndarray) -> float:
    return 2.0 * (shape.latent + shape.rope) * float(lengths.sum())


def _functions(shape: shapes.Shape) -> dict[str, Callable[..., jax.Array]]:
    """Contenders; arguments (q, cache, lengths, block tables)."""

    def run(implementation: str, paged: bool, q: Any, cache: Any, lengths: Any, tables: Any) -> Any:
        if paged:
            cache = cache.reshape(-1, PAGE, cache.shape[2])
        return mla_decode(
            q,
            cache,
            lengths,
            scale=SCALE,
            value_dim=shape.latent,
            block_tables_BP=tables if paged else None,
            implementation=implementation,
        )

    return {
        "ours": functools.partial(run, "mosaic", False),
        "ours, paged": functools.partial(run, "mosaic", True),
        "reference": functools.partial(run, "reference", False),
        "copy": lambda q, cache, lengths, tables: -cache,
    }


def _torch_contender(shape: shapes.Shape, sets: list[Any]) -> dict[str, timing.Contender]:
    """One token a sequence, so that no mask is needed: the heads stand as queries of one head."""
    try:
        import torch
    except ImportError:
        return {}
    if shape.tokens > 1:
        return {}
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=SCALE)
    shared = [tuple(torch.from_dlpack(x) for x in arrays) for arrays in sets]

    def run() -> list[Any]:
        return [attend(q, c[:, None], c[:, None, :, : shape.latent]) for q, c in shared]

    return {"torch": timing.Contender(run, len(sets), lambda _: torch.cuda.synchronize())}


def _num_sets(shape: shapes.Shape) -> int:
    return max(1, round(OPERANDS_BYTES / _cache_bytes(shape, _full(shape))))


def _full(shape: shapes.Shape) -> np.ndarray:
    return np.full(shape.batch, shape.entries)


def _compile(benched: tuple[shapes.Shape, ...]) -> dict[tuple[shapes.Shape, str], Any]:
    """All programs; arguments (operand sets, lengths, block tables)."""
    programs = {}
    for shape in benched:
        operands = [jax.eval_shape(lambda shape=shape: _draw(jax.random.key(0), shape))]
        tables = jax.ShapeDtypeStruct((shape.batch, shape.entries // PAGE), jnp.int32)
        lengths = jax.ShapeDtypeStruct((shape.batch,), jnp.int32)
        args = operands * _num_sets(shape), lengths, tables
        for name, run in _functions(shape).items():
            programs[shape, name] = (
                lambda sets, *rest, run=run: [run(*arrays, *rest) for arrays in sets],
                args,
            )
    return timing.compile_all(programs)


def bench(shape: shapes.Shape, compiled: Mapping[str, Any], rounds: int) -> None:
    """Tables of microseconds, bytes of the cache per second, and that over the copy's."""
    count, pages = _num_sets(shape), shape.batch * shape.entries // PAGE
    sets = [jax.block_until_ready(_draw(jax.random.key(i), shape)) for i in range(count)]
    order = np.random.default_rng(0).permutation(pages).reshape(shape.batch, -1)
    ragged = np.random.default_rng(0).integers(shape.entries // 8, shape.entries + 1, shape.batch)
    cases = {"full": _full(shape)} | ({"ragged": ragged} if shape.batch > 1 else {})
    for case, lengths in cases.items():
        args = sets, jnp.asarray(lengths, jnp.int32), jnp.asarray(order, jnp.int32)
        contenders = {n: timing.jax_contender(c, args, count) for n, c in compiled.items()}
        if case == "full":
            contenders |= _torch_contender(shape, sets)
        seconds = timing.medians(contenders, rounds=rounds)
        copied = 2 * _cache_bytes(shape, _full(shape)) / seconds["copy"]
        rows = {}
        for name, s in seconds.items():
            rate = copied if name == "copy" else _cache_bytes(shape, lengths) / s
            rows[name] = [f"{1e6 * s:.0f}", f"{rate / 1e12:.2f}", f"{rate / copied:.2f}"]
        timing.table(f"{tuple(shape)}, {case}", ["us", "TB/s", "x copy"], rows)
        print(
            f"{timing.REPEATS} runs bit-equal: {timing.repeatable(compiled['ours'], *args)}",
            flush=True,
        )


def errors() -> None:
    """Errors against float64 of ours and of the reference, on short caches with ragged lengths."""
    rows = {}
    for tokens, heads in ((1, 64), (2, 64), (3, 16)):
        shape = shapes.Shape(4, tokens, heads, CHECKED_ENTRIES, 512, 64)
        q, cache = _draw(jax.random.key(heads + tokens), shape)
        lengths = jnp.asarray([CHECKED_ENTRIES, 65, tokens - 1, 700], jnp.int32)
        run = functools.partial(mla_decode, scale=SCALE, value_dim=shape.latent)
        with jax.enable_x64(True):
            wide = q.astype(jnp.float64), cache.astype(jnp.float64)
            exact = np.asarray(run(*wide, lengths, implementation="reference"))
        cells = []
        for name in ("mosaic", "reference"):
            out = np.asarray(run(q, cache, lengths, implementation=name), np.float64)
            cells.append(f"{np.linalg.norm(out - exact) / np.linalg.norm(exact):.2e}")
        rows[f"{tokens} tokens, {heads} heads"] = cells
    timing.table("error against float64", ["ours", "reference"], rows)


def main() -> None:
    """Parses the command line and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.rounds} rounds")
    benched = (*shapes.PRODUCTION, shapes.LONG)
    programs = _compile(benched)
    for shape in benched:
        bench(shape, {n: p for (s, n), p in programs.items() if s == shape}, args.rounds)
    errors()


if __name__ == "__main__":
    main()
