"""How long a training step takes, by a roofline.

Products, attention and copies run at the reached shares of `plan.hardware`, one after the other;
elementwise work at the memory's rate. Traffic hides behind the products that it doesn't depend on
(`plan.traffic`), each kind behind its own window, so that no product hides two; what is longer than
its window is waited for.
"""

import dataclasses

from longcat_jax.config import ModelConfig
from longcat_jax.model import count
from longcat_jax.plan import hardware as shares
from longcat_jax.plan import traffic
from longcat_jax.plan.hardware import Hardware
from longcat_jax.plan.job import Job
from longcat_jax.plan.traffic import Flow

FLOAT32 = 4
OPTIMIZER_BYTES = 7 * FLOAT32
"""Of a parameter: it, its gradient and two moments are read; it, its copy and the moments are
written. Gradient and copy, in the compute dtype, count as one.
"""


@dataclasses.dataclass(frozen=True)
class Pass:
    """Seconds of one block's parts for one micro-batch."""

    attention: float
    """One of the two, its projections included."""
    ffn: float
    """One of the two."""
    experts: float
    router: float
    elementwise: float

    @property
    def total(self) -> float:
        """All of it, in a row."""
        return 2 * (self.attention + self.ffn) + self.experts + self.router + self.elementwise

    def windows(self, chunks: int) -> dict[str, float]:
        """What traffic can hide behind, by `plan.traffic`'s names; one chunk's exchange hides
        behind another's experts, too.
        """
        last = self.experts / chunks
        return {
            traffic.DENSE_PATH: self.attention + 2 * self.ffn + self.experts - last,
            traffic.BLOCK: self.attention + self.router + last,
        }

    def plus(self, other: "Pass") -> "Pass":
        """Both in a row."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Pass(*(a + b for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class Exposure:
    """Traffic of one kind in one direction, against what hides it; seconds of a step."""

    behind: str
    backward: bool
    traffic: float
    window: float

    @property
    def seconds(self) -> float:
        """What is waited for."""
        return max(self.traffic - self.window, 0.0)


@dataclasses.dataclass(frozen=True)
class Step:
    """A predicted optimizer step, in seconds."""

    blocks: float
    loss: float
    """Unembedding, MTP layer, lookup tables."""
    optimizer: float
    exposures: tuple[Exposure, ...]
    mfu: float
    """Model FLOPs at K_e real experts (SPEC's formula, nothing made again) of the peak."""
    tokens_per_second: float

    @property
    def seconds(self) -> float:
        """All of it."""
        waits = sum(exposure.seconds for exposure in self.exposures)
        return self.blocks + self.loss + self.optimizer + waits


def attention_weights(model: ModelConfig) -> int:
    """Values of one attention's matrices."""
    m, heads = model, model.num_attention_heads
    query = m.hidden_size * m.q_lora_rank + m.q_lora_rank * heads * m.qk_head_dim
    latent = m.hidden_size * m.latent_dim
    up = m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
    return query + latent + up + heads * m.v_head_dim * m.hidden_size


def _elementwise_values(job: Job) -> int:
    """Values that norms, residuals, rotations, SwiGLU, dispatch and combine move in one block on a
    device. Rows that only hold room are filled with zeros, and move like the others.
    """
    m = job.model
    norms, residuals = 4 * 2 * m.hidden_size, 4 * 3 * m.hidden_size
    rotations = 2 * 2 * 2 * m.num_attention_heads * m.qk_rope_head_dim  # cut out, put back
    token = norms + residuals + rotations + 3 * 2 * m.ffn_hidden_size
    row = 3 * m.expert_ffn_hidden_size + 3 * m.hidden_size
    return job.tokens * token + job.rows * row + job.received * 2 * m.hidden_size


def _forward(job: Job, hardware: Hardware) -> tuple[Pass, float]:
    """One block's forward pass, and the part of an attention that is not projections."""
    m, tokens, flops = job.model, job.tokens, hardware.flops
    heads = m.num_attention_heads * (m.qk_head_dim + m.v_head_dim)
    core = tokens * heads * job.config.train.sequence_length / (flops * shares.ATTENTION)
    expert = 6 * m.hidden_size * m.expert_ffn_hidden_size
    moved = _elementwise_values(job) * job.itemsize
    # Every device of the context axis makes the keys and values of whole rows.
    keys = m.kv_lora_rank * m.num_attention_heads * (m.qk_nope_head_dim + m.v_head_dim)
    weights = attention_weights(m) + (job.mesh.context - 1) * keys
    one = Pass(
        attention=2 * tokens * weights / (flops * shares.DENSE) + core,
        ffn=6 * tokens * m.hidden_size * m.ffn_hidden_size / (flops * shares.DENSE),
        experts=tokens * m.moe_topk_real * expert / (flops * shares.GROUPED),
        # Three products for its float32 weights (model/router.py).
        router=6 * tokens * m.hidden_size * m.num_router_outputs / (flops * shares.DENSE),
        elementwise=moved / (hardware.memory_rate * shares.MEMORY),
    )
    return one, core


def _backward(job: Job, forward: Pass, core: float) -> Pass:
    """One block's backward pass: two products for each, five for attention's two, and what is made
    again.
    """
    m = job.model
    inner = (3 * m.qk_head_dim + 2 * m.v_head_dim) / (m.qk_head_dim + m.v_head_dim)
    one = Pass(
        attention=2 * (forward.attention - core) + inner * core,
        ffn=2 * forward.ffn,
        experts=2 * forward.experts,
        router=2 * forward.router,
        elementwise=2 * forward.elementwise,
    )
    if job.config.train.remat == "none":
        return one
    if job.config.train.remat == "full":
        return one.plus(forward)
    return one.plus(Pass(0.0, 0.0, 0.0, 0.0, forward.elementwise))


def _head_products(job: Job) -> int:
    """Products with the unembedding: logits, which chunks make twice, and two gradients."""
    return 3 if job.config.train.vocab_chunk >= job.model.vocab_size else 4


def _loss_seconds(job: Job, hardware: Hardware) -> tuple[float, float]:
    """One micro-batch's unembedding, and what else is outside of blocks."""
    m, rate = job.model, hardware.flops * shares.DENSE
    mtp = job.part("MTP layer").values
    head = _head_products(job) * 2 * job.tokens * m.hidden_size * m.vocab_size / rate
    head *= 1 + bool(mtp)
    tables = job.part("embedding").values + job.part("MTP embedding").values
    lookup = 2 * FLOAT32 * tables / (hardware.memory_rate * shares.MEMORY)
    return head, 6 * job.tokens * mtp / rate + lookup


def _exposures(
    job: Job, hardware: Hardware, windows: dict[tuple[str, bool], float]
) -> tuple[Exposure, ...]:
    busy: dict[tuple[str, bool], float] = {}
    for flow in traffic.flows(job):
        key = flow.behind, flow.backward
        busy[key] = busy.get(key, 0.0) + seconds(flow, job, hardware)
    return tuple(Exposure(*key, time, windows.get(key, 0.0)) for key, time in busy.items())


def seconds(flow: Flow, job: Job, hardware: Hardware) -> float:
    """What a flow's collectives take in a step, nothing hidden."""
    return flow.times * flow.load(job.mesh, hardware.node).seconds(hardware)


def step(job: Job, hardware: Hardware) -> Step:
    """The predicted step."""
    config, micro = job.config, job.micro_batches
    forward, core = _forward(job, hardware)
    backward = _backward(job, forward, core)
    head, rest = _loss_seconds(job, hardware)
    times = micro * job.model.num_layers
    windows = {
        (name, direction): times * time
        for direction, one in ((False, forward), (True, backward))
        for name, time in one.windows(config.parallel.token_chunks).items()
    }
    first = micro * head / _head_products(job)
    windows[traffic.LOSS, False], windows[traffic.LOSS, True] = first, micro * head - first
    here = sum(part.here(job.mesh) for part in job.parts.values())
    sums = 3 * FLOAT32 * micro if micro > 1 else 0
    moved = here * (OPTIMIZER_BYTES + sums) / (hardware.memory_rate * shares.MEMORY)
    result = Step(
        blocks=times * (forward.total + backward.total),
        loss=micro * (head + rest),
        optimizer=moved,
        exposures=_exposures(job, hardware, windows),
        mfu=0.0,
        tokens_per_second=0.0,
    )
    rate = config.train.global_batch * config.train.sequence_length / result.seconds
    flops = count.training_flops_per_token(job.model, config.train.sequence_length)
    mfu = rate * flops / (job.mesh.num_devices * hardware.flops)
    return dataclasses.replace(result, mfu=mfu, tokens_per_second=rate)
