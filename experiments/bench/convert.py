"""How fast and in how much memory checkpoints are converted.

    python -m experiments.bench.convert --folder=DIR [--gigabytes=3.3] [--threads=4]

Makes a random bf16 checkpoint in the released layout (full tensor names, few layers, sharded),
converts it to ours and back, compares bits, and prints for each way: MB/s until the command is
done, MB/s with everything flushed to the disk, and the peak of anonymous memory (RssAnon) above
what it was after the imports. DIR needs three times the size; what is made in it is removed.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

MODEL = dict(
    vocab_size=32768,
    hidden_size=4096,
    num_layers=2,
    num_attention_heads=32,
    q_lora_rank=1024,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    ffn_hidden_size=8192,
    expert_ffn_hidden_size=2048,
    n_routed_experts=24,
    zero_expert_num=12,
    moe_topk=6,
    moe_topk_real=4.0,
    dtype="bfloat16",
)
SHARD_BYTES = 500_000_000
BLOCK = 1 << 24


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """A random checkpoint of at least that size; its bytes."""
    from longcat_jax.config import ModelConfig
    from longcat_jax.hf import config as hf_config
    from longcat_jax.hf import layout, safetensors

    config = ModelConfig(**MODEL)
    bf16 = safetensors.DTYPES["BF16"]

    def size(c: ModelConfig) -> int:
        return sum(2 * int(np.prod(tensor.shape)) for tensor in layout.tensors(c))

    while size(config) < gigabytes * 1e9:
        config = dataclasses.replace(config, n_routed_experts=config.n_routed_experts + 4)
    shards: list[dict] = [{}]
    room = SHARD_BYTES
    for tensor in layout.tensors(config):
        dtype = np.dtype(np.float32) if tensor.rule.float32 else bf16
        nbytes = dtype.itemsize * int(np.prod(tensor.shape))
        if nbytes > room and shards[-1]:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][tensor.name] = (dtype, tensor.shape)
        room -= nbytes
    folder.mkdir(parents=True)
    block = np.random.default_rng(0).normal(0, 0.02, BLOCK)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for key, entry in safetensors.create(folder / name, shard).items():
            entry.write(0, np.resize(block.astype(entry.dtype), entry.shape))
            weight_map[key] = name
            block[:1000] = np.random.default_rng(len(weight_map)).normal(0, 0.02, 1000)
    raw = hf_config.to_raw(config, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def anonymous_memory() -> int:
    """Bytes of RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("no RssAnon in the process' status")


def convert(direction: str, source: Path, output: Path, threads: int) -> dict[str, float]:
    """One conversion in this process, measured."""
    from longcat_jax.hf.from_hf import from_hf
    from longcat_jax.hf.to_hf import to_hf
    from longcat_jax.hf.transfer import Workers

    start, peak, done = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    function = {"from_hf": from_hf, "to_hf": to_hf}[direction]
    result = function(source, output, workers=Workers(threads))
    seconds = time.perf_counter() - begin
    os.sync()
    flushed = time.perf_counter() - begin
    done.set()
    watcher.join()
    moved = result.moved_bytes
    return {
        "seconds": seconds,
        "MB/s": moved / 1e6 / seconds,
        "MB/s flushed": moved / 1e6 / flushed,
        "GB": moved / 1e9,
        "RssAnon growth, GB": (peak[0] - start) / 1e9,
    }


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    from longcat_jax.hf.safetensors import open_checkpoint

    first, second = open_checkpoint(a), open_checkpoint(b)
    return first.keys() == second.keys() and all(
        entry.dtype == second[name].dtype
        and entry.read().tobytes() == second[name].read().tobytes()
        for name, entry in first.items()
    )


def measure(direction: str, source: Path, output: Path, threads: int) -> None:
    """A conversion in a process of its own; prints its figures."""
    command = [sys.executable, "-m", "experiments.bench.convert", f"--folder={source}"]
    command += [f"--child={direction}", f"--output={output}", f"--threads={threads}"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    figures = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    print(f"{direction}: {figures}", flush=True)


def main() -> None:
    """Measures both ways."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=3.3)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--child", choices=("from_hf", "to_hf"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(convert(args.child, args.folder, args.output, args.threads)))
        return
    work = args.folder / "bench_convert"
    try:
        nbytes = make_checkpoint(work / "hf", args.gigabytes)
        os.sync()
        load = os.getloadavg()[0]
        print(f"{nbytes / 1e9:.2f} GB, {args.threads} threads, {os.cpu_count()} cores, {load=:.1f}")
        measure("from_hf", work / "hf", work / "ours", args.threads)
        measure("to_hf", work / "ours", work / "back", args.threads)
        print("bit-identical" if same(work / "hf", work / "back") else "DIFFERENT BITS")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
