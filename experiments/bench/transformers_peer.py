"""transformers' LongcatFlashForCausalLM, as it comes, with our weights.

What decode.py and train_step.py print beside ours where torch and transformers are installed.

As it comes: its experts run one by one in a Python loop (the class has no other implementation),
attention is its default (SDPA), nothing is compiled by torch. Our tree becomes its weights in
memory, by the table that `longcat convert` uses; it also holds, and updates, the unused rows of
identity experts that it asks for. Dtypes are ours: the model's, routers float32.

It runs in a process of its own, before JAX takes the GPU's memory in ours.
"""

import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from longcat_jax.config import ModelConfig
from longcat_jax.hf import config as hf_config
from longcat_jax.hf import layout
from longcat_jax.model.longcat import Model
from longcat_jax.parameters import by_path

LEARNING_RATE = 1e-5  # the few steps leave the routers where they are
TRAIN_STEPS = 5


class LeftOut(Exception):
    """There is no peer here; the message says why."""


def _free_at_once() -> None:
    """What JAX frees is torch's at once: here it only makes the weights."""
    os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"


def apart[R](function: Callable[..., R], *args: Any) -> R | None:
    """`function(*args)` in a process that gives all its memory back, before ours uses the GPU;
    None, and a line that says why, where there is no peer.
    """
    names = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    try:
        if names:
            raise LeftOut(f"{' and '.join(names)} not installed")
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn, _free_at_once) as pool:
            return pool.submit(function, *args).result()
    except LeftOut as reason:
        print(f"transformers is left out: {reason}", flush=True)
        return None


def named_weights(
    arrays: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[layout.Tensor, Any]]:
    """Every HuggingFace tensor with its values, views of our arrays (numpy's or torch's)."""
    for tensor in layout.tensors(config):
        own = arrays[tensor.rule.path][tensor.index]
        rows = own.T if tensor.rule.transposed else own
        yield tensor, rows[tensor.offset : tensor.offset + tensor.shape[0]]


def load(model: Model) -> Any:
    """transformers' model with these weights, on the device that JAX takes.

    Raises:
      LeftOut: JAX has a GPU, torch has none.
    """
    import torch
    import transformers

    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        raise LeftOut("torch sees no GPU")
    config = model.config
    here = jax.device_put(model.params, jax.devices("cpu")[0])
    arrays = {path: torch.from_dlpack(leaf) for path, leaf in by_path(here).items()}
    dtype = getattr(torch, config.dtype)
    weights = {tensor.name: rows for tensor, rows in named_weights(arrays, config)}
    weights |= {t.name: torch.zeros(t.shape, dtype=dtype) for t in layout.padding(config)}
    theirs, problems = transformers.LongcatFlashForCausalLM.from_pretrained(
        None,
        config=transformers.LongcatFlashConfig(**hf_config.to_raw(config, dtype=config.dtype)),
        state_dict=weights,
        dtype=dtype,
        output_loading_info=True,
    )
    if any(problems.values()):
        raise RuntimeError(f"transformers takes other weights: {problems}")
    # It has rounded the routers to its dtype: they are computed in float32 there as well.
    for layer in theirs.model.layers:
        layer.mlp.router.to(arrays["layers/mlp/router/classifier"].dtype)
    routers = {name: rows for name, rows in weights.items() if ".router." in name}
    theirs.load_state_dict(routers, strict=False)
    return theirs.to("cuda" if gpu else "cpu")


def description(theirs: Any) -> str:
    """Versions and attention, for the line above a figure."""
    import torch
    import transformers

    attention = theirs.config._attn_implementation
    return f"transformers {transformers.__version__} (torch {torch.__version__}, {attention})"


def logits(theirs: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """[B, T, W] in float32."""
    import torch

    with torch.no_grad():
        tokens = torch.tensor(tokens_BT, dtype=torch.long, device=theirs.device)
        return theirs(tokens, use_cache=False).logits.float().cpu().numpy()


def agreement(ours: np.ndarray, theirs: np.ndarray) -> str:
    """How far two models are the same, by their logits [..., W]."""
    equal = np.mean(ours.argmax(-1) == theirs.argmax(-1))
    difference = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
    return (
        f"the likeliest token is the same at {equal:.1%} of {ours[..., 0].size} positions, logits "
        f"differ by {difference:.2%}"
    )


def seconds_per_token(theirs: Any, prompts_BT: np.ndarray, tokens: int) -> float:
    """Seconds of a step of its `generate`, greedy, with its cache: the difference of two runs, of
    one and of `tokens` new tokens, each the median of three.
    """
    import torch

    prompts = torch.tensor(prompts_BT, dtype=torch.long, device=theirs.device)
    theirs.generation_config.eos_token_id = None  # all rows to the end, as ours

    def seconds(count: int) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=count,
            ).cpu()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    return (seconds(tokens) - seconds(1)) / (tokens - 1)


class Training(NamedTuple):
    """Its training step at its fastest."""

    description: str
    seconds: float
    """Of a whole step."""
    how: str
    """Rows at a time, gradient checkpointing or not."""
    loss: float
    """Of the first batch, before any step."""


class _Trainer:
    """Its model with float32 master weights."""

    def __init__(self, theirs: Any) -> None:
        self.model = theirs
        self.weights = list(theirs.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]

    def loss(self, tokens_BT: Any) -> Any:
        """Its own, of the next token."""
        inputs, targets = tokens_BT[:, :-1], tokens_BT[:, 1:].contiguous()
        return self.model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss

    def step(self, optimizer: Any, batch: Any, micro: int) -> None:
        """A whole step; returns when it is done."""
        import torch

        for part in batch.split(micro):
            (self.loss(part) * micro / len(batch)).backward()
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        self.weights[-1].sum().item()

    def seconds(self, batches: list[Any], micro: int) -> float | None:
        """Median time of a step with `micro` rows at a time; None: out of memory."""
        import torch

        optimizer = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=True)
        times = []
        try:
            for index in range(1 + TRAIN_STEPS):
                start = time.perf_counter()
                self.step(optimizer, batches[index % len(batches)], micro)
                times.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            return None
        finally:
            for tensor in (*self.weights, *self.masters):
                tensor.grad = None
        return statistics.median(times[1:])

    def largest(self, batches: list[Any]) -> tuple[float, int] | None:
        """Median time of a step with the most rows at a time that fit, and these rows; None: not
        even one does.
        """
        import torch

        rows = len(batches[0])
        for micro in (number for number in range(rows, 0, -1) if rows % number == 0):
            torch.cuda.empty_cache()
            if (seconds := self.seconds(batches, micro)) is not None:
                return seconds, micro
        return None


def train(theirs: Any, batches: list[np.ndarray]) -> Training:
    """Times whole optimizer steps on token batches [B, T + 1].

    A step is forward, backward and update of every parameter: cross-entropy of the next token by
    its own loss (no balance loss, no router biases), gradients in the model's dtype, summed over
    micro-batches, then torch's fused AdamW on float32 master weights, copied back into the model.
    No clipping, no schedule, no input pipeline. With all activations kept and with its gradient
    checkpointing, each with as many rows at a time as fit; the faster is taken.

    Raises:
      LeftOut: not even one row fits.
    """
    import torch

    tokens = [torch.tensor(b, dtype=torch.long, device=theirs.device) for b in batches]
    trainer = _Trainer(theirs.train())
    with torch.no_grad():
        loss = statistics.mean(float(trainer.loss(row)) for row in tokens[0].split(1))
    found = []
    for how in ("all activations kept", "gradient checkpointing"):
        if how == "gradient checkpointing":
            theirs.gradient_checkpointing_enable()
        if (fastest := trainer.largest(tokens)) is not None:
            seconds, micro = fastest
            found.append((seconds, f"micro-batches of {micro}, {how}"))
    if not found:
        raise LeftOut("not even one row of a batch fits")
    return Training(description(theirs), *min(found), loss)
