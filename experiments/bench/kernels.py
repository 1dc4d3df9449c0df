"""Kernels on one Hopper GPU: ours against cuBLAS, torch, tokamax and XLA, in one process.

    python -m experiments.bench.kernels [--only grouped,skew,accumulate,...] [--rounds 8]

Contenders that are not installed are left out. Draws are fixed; three operand sets rotate, larger
than L2 together. Each table's figures come from the same minutes of the same card; a card at its
power limit runs at what the contenders before left it, hence timing.medians' shuffled rounds.
"""

import argparse
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing
from pallas_kernels import (
    gather_combine,
    gather_rows,
    gather_sum,
    grouped_gemm,
    grouped_gemm_weight_gradient,
    rms_norm,
    scatter_add,
)
from pallas_kernels.gather_combine import shapes as gather_shapes
from pallas_kernels.grouped_gemm import shapes as grouped_shapes
from pallas_kernels.rms_norm import shapes as norm_shapes
from pallas_kernels.scatter_add import shapes as scatter_shapes

SETS = 3
mosaic_gemm = functools.partial(grouped_gemm, implementation="mosaic")
# Our kernels: Hopper's, and those for GPUs before it where the extra [triton] is installed.
KINDS = {"ours": "mosaic"}
if importlib.util.find_spec("jax_triton"):
    KINDS["ours in Triton"] = "triton"


def uneven_groups(rows: int, groups: int) -> np.ndarray:
    """Sizes whose shares are uniform between 0.5 and 1.5."""
    shares = np.random.default_rng(1).uniform(0.5, 1.5, groups)
    sizes = np.floor(shares / shares.sum() * rows).astype(np.int32)
    sizes[-1] += rows - sizes.sum()
    return sizes


def zipf_groups(rows: int, groups: int) -> np.ndarray:
    """Sizes in proportion to 1 / rank, in shuffled order."""
    shares = np.random.default_rng(2).permutation(1 / np.arange(1, groups + 1))
    sizes = np.floor(shares / shares.sum() * rows).astype(np.int32)
    sizes[-1] += rows - sizes.sum()
    return sizes


def draw_operands(shape: grouped_shapes.Shape) -> list[tuple[jax.Array, ...]]:
    """SETS times (lhs, rhs, gradient of their product), bfloat16."""
    rows, contract, width, groups = shape
    dims = (rows, contract), (groups, contract, width), (rows, width)

    @jax.jit
    def draw(key: jax.Array) -> tuple[jax.Array, ...]:
        keys = jax.random.split(key, 3)
        return tuple(jax.random.normal(k, d, jnp.bfloat16) for k, d in zip(keys, dims, strict=True))

    return [jax.block_until_ready(draw(jax.random.key(i))) for i in range(SETS)]


def _value(product: Callable[..., Any], lhs: Any, rhs: Any, dout: Any, sizes: Any) -> Any:
    return product(lhs, rhs, sizes)


def _lhs_gradient(product: Callable[..., Any], lhs: Any, rhs: Any, dout: Any, sizes: Any) -> Any:
    return jax.vjp(lambda lhs: product(lhs, rhs, sizes), lhs)[1](dout)[0]


def _rhs_gradient(product: Callable[..., Any], lhs: Any, rhs: Any, dout: Any, sizes: Any) -> Any:
    return jax.vjp(lambda rhs: product(lhs, rhs, sizes), rhs)[1](dout)[0]


PASSES = {"forward": _value, "gradient to lhs": _lhs_gradient, "gradient to rhs": _rhs_gradient}


def _jax_products() -> dict[str, Callable[..., Any]]:
    products: dict[str, Callable[..., Any]] = {
        name: functools.partial(grouped_gemm, implementation=kind) for name, kind in KINDS.items()
    }
    try:
        import tokamax

        products["tokamax"] = tokamax.ragged_dot
    except ImportError as error:  # of a package that it needs, too
        print(f"tokamax is left out: {error}")
    return products


def _torch_contenders(sets: list[Any], sizes: np.ndarray) -> dict[str, timing.Contender]:
    try:
        import torch
    except ImportError:
        return {}
    offsets = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")
    shared = [tuple(torch.from_dlpack(x) for x in arrays) for arrays in sets]
    multiply = functools.partial(torch._grouped_mm, offs=offsets)
    runs = {
        "forward": lambda: [multiply(lhs, rhs) for lhs, rhs, _ in shared],
        "gradient to lhs": lambda: [multiply(d, rhs.transpose(1, 2)) for _, rhs, d in shared],
        "gradient to rhs": lambda: [multiply(lhs.t(), d) for lhs, _, d in shared],
    }
    wait = lambda _: torch.cuda.synchronize()  # noqa: E731
    return {f"{name}, torch": timing.Contender(run, len(sets), wait) for name, run in runs.items()}


def _error(shape: grouped_shapes.Shape, arrays: tuple[Any, ...], sizes: np.ndarray) -> float:
    """Norm error of the value on the first and last row of every group, against float32."""
    lhs, rhs, _ = arrays
    ends = np.cumsum(sizes)
    rows = np.stack([ends - sizes, ends - 1], axis=1)
    got = np.asarray(mosaic_gemm(lhs, rhs, jnp.asarray(sizes))[rows.reshape(-1)], np.float32)
    exact = functools.partial(jnp.einsum, "gik,gkn->gin", precision=jax.lax.Precision.HIGHEST)
    want = exact(lhs[rows].astype(jnp.float32), rhs.astype(jnp.float32))
    want = np.asarray(want).reshape(-1, shape.width)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def bench_grouped(rounds: int) -> None:
    """The four shapes, three passes each: TFLOP/s of useful work, and ratios of ours."""
    for shape in grouped_shapes.PRODUCTION:
        sets, sizes = draw_operands(shape), uneven_groups(shape.rows, shape.groups)
        sizes_G = jnp.asarray(sizes)
        functions: dict[str, Any] = {
            "dense jnp.dot": (lambda sets, _: [jnp.dot(lhs, rhs[0]) for lhs, rhs, _ in sets],)
        }
        for product_name, product in _jax_products().items():
            for name, run in PASSES.items():
                functions[f"{name}, {product_name}"] = (
                    lambda sets, sizes, run=run, product=product: [
                        run(product, *arrays, sizes) for arrays in sets
                    ],
                )
        args = sets, sizes_G
        compiled = timing.compile_all({name: (f, args) for name, (f,) in functions.items()})
        contenders = {n: timing.jax_contender(c, args, SETS) for n, c in compiled.items()}
        contenders |= _torch_contenders(sets, sizes)
        seconds = timing.medians(contenders, rounds=rounds)
        flops = 2 * shape.rows * shape.contract * shape.width
        dense = seconds.pop("dense jnp.dot")
        lines = {"dense jnp.dot": [f"{flops / dense / 1e12:.0f}", "", ""]}
        for name in sorted(seconds):
            torch_seconds = seconds.get(f"{name.split(',')[0]}, torch")
            versus = f"{torch_seconds / seconds[name]:.2f}" if torch_seconds else ""
            rate = f"{flops / seconds[name] / 1e12:.0f}"
            lines[name] = [rate, versus, f"{dense / seconds[name]:.2f}"]
        timing.table(str(tuple(shape)), ["TFLOP/s", "x torch", "x dense"], lines)
        bits = {
            n: timing.repeatable(c, *args)
            for n, c in compiled.items()
            if n.split(", ")[-1] in KINDS
        }
        error = _error(shape, sets[0], sizes)
        print(f"error {error:.1e}; {timing.REPEATS} runs bit-equal: {all(bits.values())} {bits}")


def bench_skew(rounds: int) -> None:
    """Zipf-distributed groups against the uneven ones, and lax.ragged_dot."""
    shape = grouped_shapes.PRODUCTION[0]
    sets = draw_operands(shape)
    flops = 2 * shape.rows * shape.contract * shape.width
    contenders = {}
    for groups in (uneven_groups, zipf_groups):
        sizes_G = jnp.asarray(groups(shape.rows, shape.groups))
        functions = {
            f"{name}, {groups.__name__}": (
                lambda sets, sizes, run=run: [run(mosaic_gemm, *a, sizes) for a in sets],
                (sets, sizes_G),
            )
            for name, run in PASSES.items()
        }
        for name, compiled in timing.compile_all(functions).items():
            contenders[name] = timing.jax_contender(compiled, (sets, sizes_G), SETS)
    ragged_args = *sets[0][:2], jnp.asarray(uneven_groups(shape.rows, shape.groups))
    ragged = timing.compile_all({"": (jax.lax.ragged_dot, ragged_args)})[""]
    contenders["forward, lax.ragged_dot"] = timing.jax_contender(ragged, ragged_args, 1)
    seconds = timing.medians(contenders, rounds=rounds)
    rows = {name: [f"{flops / s / 1e12:.0f}"] for name, s in sorted(seconds.items())}
    timing.table(f"skew, {tuple(shape)}", ["TFLOP/s"], rows)


def bench_accumulate(rounds: int) -> None:
    """Weight gradients of micro-batches summed in float32, from zeros on: in the kernel, and by XLA
    after it.
    """

    def inside(sums: Any, lhs: Any, dout: Any, sizes: Any) -> Any:
        return grouped_gemm_weight_gradient(lhs, dout, sizes, accumulate_GKN=sums)

    def after(sums: Any, lhs: Any, dout: Any, sizes: Any) -> Any:
        return sums + grouped_gemm_weight_gradient(lhs, dout, sizes, out_dtype=jnp.float32)

    def total(add: Callable[..., Any], sets: Any, sizes: Any) -> Any:
        _, contract, width = sets[0][1].shape
        sums = jnp.zeros((sizes.shape[0], contract, width))
        for lhs, _, dout in sets:  # one after the other, as in a loop over micro-batches
            sums = add(jax.lax.optimization_barrier(sums), lhs, dout, sizes)
        return sums

    for shape in grouped_shapes.PRODUCTION:
        args = draw_operands(shape), jnp.asarray(uneven_groups(shape.rows, shape.groups))
        adds = {"in the kernel": inside, "after it": after}
        functions = {n: (functools.partial(total, add), args) for n, add in adds.items()}
        compiled = timing.compile_all(functions)
        contenders = {n: timing.jax_contender(c, args, SETS) for n, c in compiled.items()}
        seconds = timing.medians(contenders, rounds=rounds)
        cells = {
            name: [f"{1e3 * s:.3f}", str(timing.repeatable(compiled[name], *args))]
            for name, s in seconds.items()
        }
        header = ["ms", f"{timing.REPEATS} runs bit-equal"]
        timing.table(f"sum of weight gradients, {tuple(shape)}", header, cells)


def bench_decode(rounds: int) -> None:
    """Few rows per group: the weights' bytes per second, which bound it."""
    contract, width, groups = 6144, 4096, 32
    weights = [
        a[1] for a in draw_operands(grouped_shapes.Shape(groups, contract, width, groups))[:2]
    ]
    functions, args = {}, {}
    for rows in (1, 8, 64):
        lhs = jax.random.normal(jax.random.key(rows), (groups * rows, contract), jnp.bfloat16)
        name = f"{rows} rows per group"
        args[name] = lhs, weights, jnp.full(groups, rows, jnp.int32)
        functions[name] = (
            lambda lhs, weights, sizes: [mosaic_gemm(lhs, rhs, sizes) for rhs in weights],
            args[name],
        )
    compiled = timing.compile_all(functions)
    contenders = {n: timing.jax_contender(c, args[n], len(weights)) for n, c in compiled.items()}
    moved = 2 * groups * contract * width
    seconds = timing.medians(contenders, rounds=rounds)
    rows = {n: [f"{1e3 * s:.3f}", f"{moved / s / 1e12:.2f}"] for n, s in seconds.items()}
    timing.table(f"decode, {contract}, {width}, {groups} groups", ["ms", "TB/s of weights"], rows)


def bench_ffn(rounds: int) -> None:
    """The whole expert: gate and up, SwiGLU, down; forward and backward."""
    rows, width, hidden, groups = 32768, 6144, 2048, 16
    gate_up = draw_operands(grouped_shapes.Shape(rows, width, 2 * hidden, groups))
    down = draw_operands(grouped_shapes.Shape(rows, hidden, width, groups))
    sizes_G = jnp.asarray(uneven_groups(rows, groups))

    def expert(x: Any, gate_up: Any, down: Any, sizes: Any) -> Any:
        gate, up = jnp.split(mosaic_gemm(x, gate_up, sizes), 2, axis=-1)
        return mosaic_gemm(jax.nn.silu(gate) * up, down, sizes)

    def run(operands: Any, sizes: Any) -> list[Any]:
        results = []
        for x, w1, w2, dout in operands:
            out, vjp = jax.vjp(lambda *weights: expert(*weights, sizes), x, w1, w2)
            results.append((out, vjp(dout)))
        return results

    # Weights that keep the scale of their input: gates of large numbers would be zeros and ones.
    operands = [
        (a[0], a[1] * width**-0.5, b[1] * hidden**-0.5, b[2])
        for a, b in zip(gate_up, down, strict=True)
    ]
    compiled = timing.compile_all({"expert": (run, (operands, sizes_G))})["expert"]
    contender = timing.jax_contender(compiled, (operands, sizes_G), SETS)
    seconds = timing.medians({"expert": contender}, rounds=rounds)["expert"]
    flops = 3 * (2 * rows * width * 2 * hidden + 2 * rows * hidden * width)
    cells = [f"{1e3 * seconds:.2f}", f"{flops / seconds / 1e12:.0f}"]
    timing.table("expert FFN", ["ms", "TFLOP/s"], {"forward + backward": cells})


def _ids(name: str, shape: scatter_shapes.Shape) -> jax.Array:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, shape.destinations, shape.rows)
    if name == "half on one id":
        ids[rng.permutation(shape.rows)[: shape.rows // 2]] = 17
    if name == "embedding, Zipf":
        ids = rng.zipf(1.1, 8 * shape.rows) - 1
        ids = ids[ids < shape.destinations][: shape.rows]
    return jnp.asarray(ids, jnp.int32)


def bench_scatter(rounds: int) -> None:
    """Milliseconds for bf16 rows into float32; values over many binary orders."""
    cases = {
        "uniform": scatter_shapes.ROUTED,
        "half on one id": scatter_shapes.ROUTED,
        "embedding, Zipf": scatter_shapes.EMBEDDING,
    }

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
        a, b = jax.random.split(key)
        orders = 2.0 ** jax.random.randint(b, shape, -12, 12)
        return (jax.random.normal(a, shape) * orders).astype(jnp.bfloat16)

    rows = {}
    for name, shape in cases.items():
        args = draw(jax.random.key(0), shape[:2]), _ids(name, shape)
        num_rows = shape.destinations

        def ours(values: Any, ids: Any, num_rows: int = num_rows, *, kind: str) -> Any:
            return scatter_add(values, ids, num_rows, implementation=kind)

        def atomics(values: Any, ids: Any, num_rows: int = num_rows) -> Any:
            out = jnp.zeros((num_rows, values.shape[1]), jnp.float32)
            return out.at[ids].add(values.astype(jnp.float32))

        functions = {n: (functools.partial(ours, kind=kind), args) for n, kind in KINDS.items()}
        compiled = timing.compile_all(functions | {"XLA atomics": (atomics, args)})
        contenders = {n: timing.jax_contender(c, args, 1) for n, c in compiled.items()}
        seconds = timing.medians(contenders, rounds=rounds)
        equal = all(timing.repeatable(compiled[n], *args) for n in KINDS)
        rows[name] = [*(f"{1e3 * seconds[n]:.3f}" for n in contenders), str(equal)]
    timing.table("scatter-add, ms", [*contenders, f"{timing.REPEATS} runs bit-equal"], rows)


def _gather_functions() -> dict[str, Callable[..., Any]]:
    """Dispatch and combine, each the other's gradient, and the weighed combine that the model does
    not use; arguments (values, x, weights, slots, token of row, dout).
    """

    def rows(name: str) -> Callable[..., Any]:
        def run(values: Any, x: Any, weights: Any, slots: Any, token: Any, dout: Any) -> Any:
            return gather_rows(x, token, slots, implementation=name)

        return run

    def add(values: Any, x: Any, weights: Any, slots: Any, token: Any, dout: Any) -> Any:
        return gather_sum(values, token, slots)

    def weigh(values: Any, x: Any, weights: Any, slots: Any, token: Any, dout: Any) -> Any:
        return gather_combine(values, slots, weights)

    def gradient(values: Any, x: Any, weights: Any, slots: Any, token: Any, dout: Any) -> Any:
        return jax.vjp(lambda v, w: gather_combine(v, slots, w), values, weights)[1](dout)

    return {
        **{f"dispatch, {kind}": rows(kind) for kind in ("reference", *KINDS.values())},
        "combine": add,
        "weighed combine": weigh,
        "weighed combine, gradient": gradient,
    }


def bench_gather(rounds: int) -> None:
    """Dispatch and combine: milliseconds, and bytes per second: a gathered row counted every time,
    and once (tokens that are gathered again soon come from L2).

    Tokens stand in the order that routing leaves them in: by expert, then by token.
    """

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key: jax.Array, rows: int, width: int) -> jax.Array:
        return jax.random.normal(key, (rows, width), jnp.bfloat16)

    for shape in gather_shapes.PRODUCTION:
        tokens, selected, width = shape
        rows = tokens * selected
        experts = np.random.default_rng(0).integers(0, 64, rows)
        slots = np.argsort(np.argsort(experts, kind="stable")).reshape(tokens, selected)
        keys = jax.random.split(jax.random.key(0), 4)
        args = (
            draw(keys[0], rows, width),
            draw(keys[1], tokens, width),
            jax.random.uniform(keys[2], slots.shape),
            jnp.asarray(slots, jnp.int32),
            jnp.asarray(np.argsort(slots.reshape(-1)) // selected, jnp.int32),
            draw(keys[3], tokens, width),
        )
        functions = _gather_functions()
        compiled = timing.compile_all({name: (f, args) for name, f in functions.items()})
        contenders = {n: timing.jax_contender(c, args, 1) for n, c in compiled.items()}
        cells = {}
        for name, seconds in sorted(timing.medians(contenders, rounds=rounds).items()):
            gradient = name.endswith("gradient")
            sweeps = 3 if gradient else 2 if name.startswith("dispatch") else 1
            moved = 2 * width * (sweeps * rows + (tokens if sweeps == 1 else 0))
            distinct = 2 * width * (rows * (2 if gradient else 1) + tokens)
            rates = [f"{n / seconds / 1e12:.2f}" for n in (moved, distinct)]
            equal = str(timing.repeatable(compiled[name], *args))
            cells[name] = [f"{1e3 * seconds:.3f}", *rates, equal]
        header = ["ms", "TB/s", "TB/s, once", f"{timing.REPEATS} runs bit-equal"]
        timing.table(str(tuple(shape)), header, cells)


def bench_norm(rounds: int) -> None:
    """Gradient of a norm with that of the residual stream: milliseconds, bytes per second."""

    def run(kind: str, *arrays: jax.Array) -> Any:
        x, weight, *gradients = arrays
        norm = functools.partial(rms_norm, eps=1e-5, implementation=kind)
        return jax.vjp(norm, x, weight)[1](tuple(gradients))

    cells = {}
    for shape in norm_shapes.PRODUCTION:
        keys = jax.random.split(jax.random.key(0), 3)
        x, *gradients = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
        args = x, jnp.ones(shape.width), *gradients
        kinds = {"ours": "mosaic", "XLA": "reference"}
        functions = {name: (functools.partial(run, kind), args) for name, kind in kinds.items()}
        compiled = timing.compile_all(functions)
        contenders = {name: timing.jax_contender(c, args, 1) for name, c in compiled.items()}
        for name, seconds in timing.medians(contenders, rounds=rounds).items():
            rate = 4 * x.nbytes / seconds / 1e12  # three are read, one is written
            cells[f"{tuple(shape)}, {name}"] = [f"{1e3 * seconds:.3f}", f"{rate:.2f}"]
    timing.table("gradient of a norm", ["ms", "TB/s"], cells)


BENCHES = {
    "grouped": bench_grouped,
    "skew": bench_skew,
    "accumulate": bench_accumulate,
    "decode": bench_decode,
    "ffn": bench_ffn,
    "scatter": bench_scatter,
    "gather": bench_gather,
    "norm": bench_norm,
}


def main() -> None:
    """Parses the command line and prints the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(BENCHES), help="tables, separated by commas")
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := sorted(set(names) - set(BENCHES)):
        parser.error(f"--only={','.join(unknown)}: choose from {', '.join(BENCHES)}")
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, {args.rounds} rounds")
    for name in names:
        BENCHES[name](args.rounds)


if __name__ == "__main__":
    main()
