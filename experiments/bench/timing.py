"""Timing of contenders on one accelerator, interleaved, so that their ratios hold on a hot card."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longcat_jax.plan.hardware import Hardware, of_device

REPEATS = 100  # runs that must agree


def machine() -> Hardware:
    """Peaks of this machine's GPU, by its vendor's data sheet."""
    kind = jax.devices()[0].device_kind
    found = of_device(kind)
    if not found:
        raise SystemExit(f"{kind}: its peaks are not known (longcat_jax/plan/hardware.py)")
    return found


class Contender(NamedTuple):
    """`run` issues `operations` operations and returns something that `wait` waits for."""

    run: Callable[[], Any]
    operations: int
    wait: Callable[[Any], Any]


def compile_all(functions: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> dict:
    """Compiles {name: (function, arguments)}: traced one by one, compiled in threads."""
    lowered = {name: jax.jit(f).lower(*args) for name, (f, args) in functions.items()}
    with ThreadPoolExecutor(12) as pool:
        compiled = pool.map(lambda item: item[1].compile(), lowered.items())
        return dict(zip(lowered, compiled, strict=True))


def jax_contender(
    compiled: Callable[..., Any], args: tuple[Any, ...], operations: int
) -> Contender:
    """A compiled JAX function that does `operations` operations a call."""
    return Contender(lambda: compiled(*args), operations, jax.block_until_ready)


def medians(
    contenders: Mapping[str, Contender], *, rounds: int = 8, burst: float = 0.018
) -> dict[str, float]:
    """Median seconds per operation by name.

    Every round runs all contenders, in shuffled order and without a pause, each for about `burst`
    seconds: long enough to hide the launch, short enough for all to see the same clocks.
    """
    calls = {}
    for name, contender in contenders.items():
        contender.wait(contender.run())
        start = time.perf_counter()
        contender.wait(contender.run())
        calls[name] = max(1, round(burst / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            run, operations, wait = contenders[name]
            start = time.perf_counter()
            for _ in range(calls[name]):
                result = run()
            wait(result)
            times[name].append((time.perf_counter() - start) / calls[name] / operations)
            del result
    return {name: statistics.median(values) for name, values in times.items()}


def repeatable(run: Callable[..., Any], *args: Any) -> bool:
    """Whether REPEATS runs give the same bits; before some of them another program ran."""
    other = jax.jit(lambda x: x @ x.T)
    noise = jnp.ones((4096, 4096), jnp.bfloat16)

    @jax.jit
    def same(first: Any, second: Any) -> jax.Array:
        def bits(x: jax.Array) -> jax.Array:
            return x.view(f"uint{8 * x.dtype.itemsize}")

        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
        return jnp.all(jnp.array([jnp.array_equal(bits(a), bits(b)) for a, b in pairs]))

    first = run(*args)
    for i in range(REPEATS):
        if i % 3 == 0:
            other(noise)
        if not bool(same(first, run(*args))):
            return False
    return True


def table(title: str, header: list[str], rows: Mapping[str, list[str]]) -> None:
    """Prints a markdown table."""
    print(f"\n| {title} | {' | '.join(header)} |", flush=True)
    print("|---" * (len(header) + 1) + "|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
