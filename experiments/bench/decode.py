"""Greedy decoding speed of a configuration on this machine, beside the bandwidth bound.

    python -m experiments.bench.decode --config=configs/mini_2b.py [--context=512]
        [--batches=1,16,64] [--tokens=64]

Random weights and prompts. A step's time is the difference of two runs of one compiled program, of
few and of many tokens. The bound is the time to read once from memory what a step has to read: the
weights that its tokens use and the caches. How many experts that is, is counted on the prompts'
own routing.
"""

import argparse
import statistics
import time

import jax
import numpy as np

import longcat_jax as lc
from experiments.bench import timing
from longcat_jax.cli.config_file import load_config
from longcat_jax.config import ModelConfig
from longcat_jax.inference.generate import make_request
from longcat_jax.model import count, longcat
from longcat_jax.parameters import unbox

BYTES = 2  # of a weight or cache entry


def random_model(config: ModelConfig) -> longcat.Model:
    """Fresh weights in the dtype that decoding reads them in; routers keep theirs."""

    @jax.jit
    def make(key: jax.Array) -> longcat.Params:
        return longcat.working_params(unbox(longcat.init(config, key)), config)

    return longcat.Model(config, make(jax.random.key(0)))


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
    return (many - few) / (tokens - 1), few


def main() -> None:
    """Parses the command line and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--context", type=int, default=512, help="tokens of every prompt")
    parser.add_argument("--batches", default="1,16,64", help="batch sizes, separated by commas")
    parser.add_argument("--tokens", type=int, default=64, help="tokens made, at least 2")
    args = parser.parse_args()
    model = random_model(load_config(args.config).model)
    config, rng = model.config, np.random.default_rng(0)
    rows = {}
    for batch in map(int, args.batches.split(",")):
        prompts = rng.integers(0, config.vocab_size, (batch, args.context), dtype=np.int32)
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
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, context {args.context}, {config.dtype}")
    header = ["ms a step", "bound, ms", "of the bound", "tokens/s", "prefill tokens/s", "experts"]
    timing.table("greedy decoding", header, rows)


if __name__ == "__main__":
    main()
