"""MLA attention on one Hopper GPU: ours against tokamax, torch and cuDNN, in one process.

    python -m experiments.bench.attention [--only whole,long,packed] [--rounds 8]

Contenders that are not installed, or don't take these widths, are left out. TFLOP/s count useful
operations of the causal half: 2 (Q + V) a pair forward, 2 (3 Q + 2 V) backward.
"""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from pallas_kernels import flash_mla
from pallas_kernels.flash_mla import shapes

LAYERS = 4  # attentions of a program, where it has several


class Operands(NamedTuple):
    """Normal numbers in bfloat16; `rope` is the part of the keys that all heads share."""

    q: jax.Array
    k: jax.Array
    rope: jax.Array
    v: jax.Array
    dout: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def draw(shape: shapes.Shape, seed: int = 0) -> Operands:
    """Operands of a shape."""
    lead = shape.batch, shape.tokens, shape.heads
    dims = (
        (*lead, shape.nope + shape.rope),
        (*lead, shape.nope),
        (*lead[:2], shape.rope),
        (*lead, shape.value),
        (*lead, shape.value),
    )
    keys = jax.random.split(jax.random.key(seed), len(dims))
    return Operands(
        *(jax.random.normal(k, d, jnp.bfloat16) for k, d in zip(keys, dims, strict=True))
    )


def scale_of(shape: shapes.Shape) -> float:
    """1 / sqrt(query width)."""
    return (shape.nope + shape.rope) ** -0.5


def flops(shape: shapes.Shape) -> dict[str, float]:
    """Useful operations of each pass."""
    pairs = shape.batch * shape.heads * shape.tokens**2 / 2
    width = shape.nope + shape.rope
    forward, backward = 2 * pairs * (width + shape.value), 2 * pairs * (3 * width + 2 * shape.value)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def whole_keys(k: jax.Array, rope: jax.Array) -> jax.Array:
    """Keys as the others take them: the shared part copied to every head."""
    shared = jnp.broadcast_to(rope[:, :, None], (*k.shape[:3], rope.shape[2]))
    return jnp.concatenate([k, shared], axis=3)


def _ours(shape: shapes.Shape, segment_ids: Any = None) -> Callable[..., jax.Array]:
    def attend(q: Any, k: Any, rope: Any, v: Any) -> jax.Array:
        return flash_mla(
            q,
            k,
            v,
            scale=scale_of(shape),
            k_rope=rope,
            segment_ids=segment_ids,
            implementation="mosaic",
        )

    return attend


def _tokamax(shape: shapes.Shape) -> Callable[..., jax.Array]:
    import tokamax

    def attend(q: Any, k: Any, v: Any) -> jax.Array:
        return tokamax.dot_product_attention(
            q, k, v, is_causal=True, scale=scale_of(shape), implementation="mosaic"
        )

    return attend


def _cudnn(shape: shapes.Shape) -> Callable[..., jax.Array]:
    def attend(q: Any, k: Any, v: Any) -> jax.Array:
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[3] - v.shape[3])))
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=scale_of(shape), implementation="cudnn"
        )
        return out[..., : shape.value]

    return attend


def _jax_passes(attend: Callable[..., Any], args: tuple[Any, ...], dout: Any) -> dict:
    """Compiled forward, backward alone and both, with their arguments."""

    def both(args: Any, dout: Any) -> Any:
        out, vjp = jax.vjp(attend, *args)
        return out, *vjp(dout)

    residuals = jax.jit(lambda *args: jax.vjp(attend, *args)[1])(*args)
    functions = {
        "forward": (attend, args),
        "backward": (lambda vjp, dout: vjp(dout), (residuals, dout)),
        "both": (both, (args, dout)),
    }
    compiled = timing.compile_all(functions)
    return {name: (compiled[name], functions[name][1]) for name in functions}


def _torch_passes(args: tuple[Any, ...], dout: jax.Array, scale: float) -> dict[str, Any]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads_first = [jnp.swapaxes(x, 1, 2).copy() for x in (*args, dout)]
    q, k, v, d = (torch.from_dlpack(x) for x in heads_first)
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def forward() -> Any:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                *inputs, is_causal=True, scale=scale
            )

    out = forward()
    runs = {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, inputs, d, retain_graph=True),
        "both": lambda: torch.autograd.grad(forward(), inputs, d),
    }
    runs["both"]()  # fails here where the backend does not take the widths
    return runs


@functools.partial(jax.jit, static_argnums=0)
def _exact(shape: shapes.Shape, x: Operands) -> tuple[jax.Array, ...]:
    """Output and gradients in float32, a head at a time: out, dq, dk with the rope part, dv."""

    def head(operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q, k, v, dout = (y.astype(jnp.float32) for y in operands)

        def attend(q: Any, k: Any, v: Any) -> jax.Array:
            scores = jnp.einsum("bqd,bkd->bqk", q, k) * scale_of(shape)
            seen = jnp.tril(jnp.ones(scores.shape[1:], bool))
            weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
            return jnp.einsum("bqk,bkd->bqd", weights, v)

        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    operands = x.q, whole_keys(x.k, x.rope), x.v, x.dout
    with jax.default_matmul_precision("highest"):
        results = jax.lax.map(head, tuple(jnp.moveaxis(y, 2, 0) for y in operands))
    return tuple(jnp.moveaxis(y, 0, 2) for y in results)


def _norm_error(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def bench_whole(rounds: int) -> None:
    """The production shape: TFLOP/s, error against float32, repeatability; all contenders."""
    shape = shapes.PRODUCTION[0]
    x = draw(shape)
    plain = x.q, whole_keys(x.k, x.rope), x.v
    contenders: dict[tuple[str, str], timing.Contender] = {}
    results: dict[str, Callable[[], Any]] = {}
    rivals = {"ours": _ours, "tokamax": _tokamax, "jax.nn, cuDNN": _cudnn}
    for name, build in rivals.items():
        try:
            args = (x.q, x.k, x.rope, x.v) if name == "ours" else plain
            passes = _jax_passes(build(shape), args, x.dout)
            for step, (compiled, operands) in passes.items():
                contenders[name, step] = timing.jax_contender(compiled, operands, 1)
            results[name] = contenders[name, "both"].run
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            print(f"{name}: left out, {type(error).__name__}: {str(error)[:200]}", flush=True)
    try:
        import torch

        for step, run in _torch_passes(plain, x.dout, scale_of(shape)).items():
            contenders["torch, cuDNN", step] = timing.Contender(
                run, 1, lambda _: torch.cuda.synchronize()
            )
    except (ImportError, RuntimeError) as error:
        print(f"torch: left out, {type(error).__name__}: {str(error)[:200]}", flush=True)
    seconds = timing.medians(contenders, rounds=rounds)
    exact = _exact(shape, x)
    rows = {}
    for name in dict.fromkeys(name for name, _ in contenders):
        cells = [f"{flops(shape)[s] / seconds[name, s] / 1e12:.0f}" for s in flops(shape)]
        if name in results:
            out, dq, *dk, dv = results[name]()
            want = (*exact[:2], exact[2][..., : dk[0].shape[3]], exact[3])
            pairs = zip((out, dq, dk[0], dv), want, strict=True)
            cells.append(" ".join(f"{_norm_error(a, b):.1e}" for a, b in pairs))
            cells.append(str(timing.repeatable(results[name])))
        else:
            cells += ["", ""]
        rows[name] = cells
    header = ["forward", "backward", "both", "error of out, dq, dk, dv", "100 runs bit-equal"]
    timing.table(f"TFLOP/s, {tuple(shape)}", header, rows)


def bench_long(rounds: int) -> None:
    """Ours at 8k and 32k tokens, side by side."""
    contenders, work = {}, {}
    for shape in shapes.PRODUCTION:
        x = draw(shape)
        passes = _jax_passes(_ours(shape), (x.q, x.k, x.rope, x.v), x.dout)
        for step, (compiled, operands) in passes.items():
            contenders[shape.tokens, step] = timing.jax_contender(compiled, operands, 1)
            work[shape.tokens, step] = flops(shape)[step]
    seconds = timing.medians(contenders, rounds=rounds)
    rows = {
        f"{tokens} tokens": [
            f"{work[tokens, step] / seconds[tokens, step] / 1e12:.0f}" for step in flops(shape)
        ]
        for tokens in dict.fromkeys(tokens for tokens, _ in contenders)
    }
    timing.table("TFLOP/s by length", list(flops(shape)), rows)


def bench_packed(rounds: int) -> None:
    """Documents of 2048 tokens packed into 8192: time of an attention against a quarter of the
    whole's. A program has several that share the segment ids, as the layers of a model.
    """
    shape = shapes.PRODUCTION[0]
    layers = [draw(shape, seed) for seed in range(LAYERS)]
    operands = tuple((x.q, x.k, x.rope, x.v) for x in layers)
    douts = [x.dout for x in layers]
    document = 2048
    ids = jnp.arange(shape.tokens, dtype=jnp.int32)[None] // document
    contenders = {}
    for name, segment_ids in (("whole", None), ("packed", ids)):
        attend = _ours(shape, segment_ids)

        def all_layers(*layers: Any, attend: Any = attend) -> list[jax.Array]:
            return [attend(*layer) for layer in layers]

        for step, (compiled, args) in _jax_passes(all_layers, operands, douts).items():
            contenders[name, step] = timing.jax_contender(compiled, args, LAYERS)
    seconds = timing.medians(contenders, rounds=rounds)
    rows = {}
    for step in flops(shape):
        whole, packed = seconds["whole", step], seconds["packed", step]
        ideal = whole * document / shape.tokens
        rows[step] = [f"{1e3 * whole:.3f}", f"{1e3 * packed:.3f}", f"{ideal / packed:.2f}"]
    timing.table("packed documents", ["whole, ms", "packed, ms", "of the ideal"], rows)


BENCHES = {"whole": bench_whole, "long": bench_long, "packed": bench_packed}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(BENCHES))
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    print(jax.devices()[0].device_kind, flush=True)
    for name in options.only.split(","):
        BENCHES[name](options.rounds)


if __name__ == "__main__":
    main()
