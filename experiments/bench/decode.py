"""Greedy decoding speed of a configuration, beside the bandwidth bound and transformers.

    python -m experiments.bench.decode --config=configs/mini_2b.py [--context=512]
        [--batches=1,16,64] [--tokens=64] [--no-peer]

Random weights and prompts. A step's time is the difference of two runs of one compiled program, of
few and of many tokens. The bound is the time to read once from memory what a step has to read: the
weights that its tokens use and the caches. How many experts that is, is counted on the prompts'
own routing. Where transformers is installed its figure with the same weights and prompts stands
beside ours (transformers_peer.py), and how far the two agree on a prompt.
"""

import argparse
import statistics
import time
from typing import NamedTuple

import jax
import numpy as np

import longcat_jax as lc
from experiments.bench import timing, transformers_peer
from longcat_jax.cli.config_file import load_config
from longcat_jax.config import ModelConfig, ProxyConfig
from longcat_jax.inference.generate import make_request, steps_run
from longcat_jax.model import count, longcat
from longcat_jax.parameters import unbox

BYTES = 2  # of a weight or cache entry


def random_model(
    config: ModelConfig, seed: int = 0, proxy: ProxyConfig | None = None
) -> longcat.Model:
    """Fresh weights in the dtype that decoding reads them in; routers keep theirs."""

    @jax.jit
    def make(key: jax.Array) -> longcat.Params:
        return longcat.working_params(unbox(longcat.init(config, key, proxy)), config)

    return longcat.Model(config, make(jax.random.key(seed)))


def distinct_experts(model: longcat.Model, prompts: np.ndarray) -> float:
    """Real experts that the last token of every prompt selects, all rows together: mean over
    layers.
    """
    selected_LBK = np.asarray(lc.forward(model, prompts).selected_experts)[:, :, -1]
    real = [np.unique(ids[ids < model.config.n_routed_experts]) for ids in selected_LBK]
    return float(np.mean([len(ids) for ids in real]))


def bytes_per_step(config: ModelConfig, experts: float, cache_entries: int) -> float:
    """Bytes that a step reads: weights of `experts` real experts a layer, caches of all rows."""
    c = config
    weights = count.active_parameters(c, experts)
    # Routers are float32: counted once more.
    weights += c.num_layers * c.hidden_size * c.num_router_outputs
    cache = cache_entries * 2 * c.num_layers * c.latent_dim
    return BYTES * (weights + cache)


def measure(model: longcat.Model, prompts: np.ndarray, tokens: int) -> tuple[float, float]:
    """(seconds per decoding step, seconds of the prefill with the first token)."""
    request = make_request(model, list(prompts), max_new_tokens=tokens, eos=())

    def seconds(limit: int) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            request.run(limit=limit)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    few, many = seconds(1), seconds(tokens)
    return (many - few) / steps_run(tokens), few


class Peer(NamedTuple):
    """What transformers does with the same weights and prompts."""

    description: str
    steps: list[float]
    """Seconds per decoding step, of every batch."""
    logits: np.ndarray
    """Of the first prompt, [1, T, W]."""


def measure_peer(config: ModelConfig, prompts: list[np.ndarray], tokens: int) -> Peer:
    """transformers' figures; see transformers_peer.py for where this may run."""
    theirs = transformers_peer.load(random_model(config))
    logits = transformers_peer.logits(theirs, prompts[0][:1])
    steps = []
    for batch in prompts:
        steps.append(transformers_peer.seconds_per_token(theirs, batch, tokens))
        print(f"batch {len(batch)}: transformers {1e3 * steps[-1]:.1f} ms a step", flush=True)
    return Peer(transformers_peer.description(theirs), steps, logits)


def main() -> None:
    """Parses the command line and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--context", type=int, default=512, help="tokens of every prompt")
    parser.add_argument("--batches", default="1,16,64", help="batch sizes, separated by commas")
    parser.add_argument("--tokens", type=int, default=64, help="tokens made, at least 2")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    config, rng = load_config(args.config).model, np.random.default_rng(0)
    shapes = [(int(batch), args.context) for batch in args.batches.split(",")]
    drawn = [rng.integers(0, config.vocab_size, shape, dtype=np.int32) for shape in shapes]
    peer = transformers_peer.apart(measure_peer, config, drawn, args.tokens) if args.peer else None
    model = random_model(config)
    rows = {}
    for index, prompts in enumerate(drawn):
        batch = len(prompts)
        step, prefill = measure(model, prompts, args.tokens)
        experts = distinct_experts(model, prompts[: min(batch, 64)])
        entries = batch * (args.context + args.tokens // 2)
        bound = bytes_per_step(config, experts, entries) / timing.machine().memory_rate
        print(f"batch {batch}: {1e3 * step:.3f} ms a step", flush=True)
        rows[f"batch {batch}"] = [
            f"{1e3 * step:.3f}",
            f"{1e3 * bound:.3f}",
            f"{bound / step:.1%}",
            f"{batch / step:,.0f}",
            f"{batch * args.context / prefill:,.0f}",
            f"{experts:.1f}",
        ]
        if peer:
            theirs = peer.steps[index]
            rows[f"batch {batch}"] += [f"{1e3 * theirs:.1f}", f"{theirs / step:.1f}"]
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, context {args.context}, {config.dtype}")
    header = ["ms a step", "bound, ms", "of the bound", "tokens/s", "prefill tokens/s", "experts"]
    if peer:
        ours = np.asarray(lc.forward(model, drawn[0][:1]).logits)
        print(f"{peer.description}: {transformers_peer.agreement(ours, peer.logits)}")
        header += ["transformers, ms", "times ours"]
    timing.table("greedy decoding", header, rows)


if __name__ == "__main__":
    main()
