"""The job's configuration: frozen dataclasses that validate themselves.

A file in configs/ returns an `ml_collections.ConfigDict`; `from_mapping` turns it (or a saved
config.json) into a `Config`. Everything past the entry point sees dataclasses only. Defaults live
here and nowhere else. Field names of `ModelConfig` are HuggingFace's (config.json of the released
checkpoint).

Every check raises `ConfigError` with one line: the field, the value, what is allowed.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from longcat_jax.dataclass_mapping import ConfigError as ConfigError
from longcat_jax.dataclass_mapping import build, check_known, require
from longcat_jax.dataclass_mapping import differences as differences
from longcat_jax.dataclass_mapping import override as override
from longcat_jax.dataclass_mapping import read_json as read_json
from longcat_jax.dataclass_mapping import to_mapping as to_mapping

DTYPES = ("bfloat16", "float16", "float32", "float64")
REMAT_POLICIES = ("none", "ample", "selective", "full")
SCHEDULES = ("wsd", "cosine")
KERNELS = ("auto", "reference")  # pallas_kernels.KINDS; here nothing imports JAX
SHAPE_FIELDS = ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "q_lora_rank")
SHAPE_FIELDS += ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
SHAPE_FIELDS += ("ffn_hidden_size", "expert_ffn_hidden_size", "n_routed_experts")
SHAPE_FIELDS += ("zero_expert_num", "num_nextn_predict_layers")
"""Fields of `ModelConfig` that parameters depend on."""
EXPERT_BACKENDS = ("auto", "dense", "allgather", "all_to_all")
MESH_AXES = ("data", "fsdp", "pipeline", "context", "expert")


def _positive(prefix: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}.{name}", value, "> 0")


def _not_negative(prefix: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{prefix}.{name}", value, ">= 0")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN (arXiv 2309.00071) as HuggingFace's `rope_scaling` writes it."""

    factor: float
    original_max_position_embeddings: int
    type: str = "yarn"
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        require(self.type == "yarn", "model.rope_scaling.type", self.type, "'yarn'")
        require(self.factor >= 1, "model.rope_scaling.factor", self.factor, ">= 1")
        _positive("model.rope_scaling", self, "original_max_position_embeddings", "beta_slow")
        faster = self.beta_fast > self.beta_slow
        require(faster, "model.rope_scaling.beta_fast", self.beta_fast, "> beta_slow")
        _not_negative("model.rope_scaling", self, "mscale", "mscale_all_dim")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture, by HuggingFace's names (arXiv 2509.01322, section 2 and the released
    config.json).
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    ffn_hidden_size: int
    expert_ffn_hidden_size: int
    n_routed_experts: int
    zero_expert_num: int
    moe_topk: int
    moe_topk_real: float
    """K_e: real experts per token that the PID controller steers to; the rest of K are identity
    experts.
    """
    routed_scaling_factor: float = 1.0
    """gamma of the variance compensation (section 2.2.2): multiplies every gate, identity experts
    included.
    """
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    mla_norm_eps: float = 1e-6
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    num_nextn_predict_layers: int = 1
    """MTP heads: 0 or 1."""
    bos_token_id: int = 1
    eos_token_id: int = 2
    dtype: str = "bfloat16"
    """Compute dtype. Router, softmax, norm statistics, losses and master weights have at least
    float32.
    """

    def __post_init__(self) -> None:
        sizes = [f.name for f in dataclasses.fields(self) if f.type is int]
        free = {"zero_expert_num", "num_nextn_predict_layers", "bos_token_id", "eos_token_id"}
        _positive("model", self, *(name for name in sizes if name not in free))
        _not_negative("model", self, *free)
        _positive(
            "model",
            self,
            "routed_scaling_factor",
            "rope_theta",
            "rms_norm_eps",
            "mla_norm_eps",
            "initializer_range",
        )
        even = self.qk_rope_head_dim % 2 == 0
        require(even, "model.qk_rope_head_dim", self.qk_rope_head_dim, "even (rotated in pairs)")
        total = self.num_router_outputs
        require(
            self.moe_topk <= total,
            "model.moe_topk",
            self.moe_topk,
            f"at most n_routed_experts + zero_expert_num = {total}",
        )
        most = min(self.moe_topk, self.n_routed_experts)
        require(
            0 < self.moe_topk_real <= most,
            "model.moe_topk_real",
            self.moe_topk_real,
            f"above 0 and at most min(moe_topk, n_routed_experts) = {most}",
        )
        least = self.moe_topk - self.zero_expert_num  # each token has at least these
        require(
            self.moe_topk_real >= least,
            "model.moe_topk_real",
            self.moe_topk_real,
            f"at least moe_topk - zero_expert_num = {least}",
        )
        for name in ("bos_token_id", "eos_token_id"):
            known = getattr(self, name) < self.vocab_size
            require(
                known, f"model.{name}", getattr(self, name), f"< vocab_size = {self.vocab_size}"
            )
        nextn = self.num_nextn_predict_layers
        require(nextn in (0, 1), "model.num_nextn_predict_layers", nextn, "0 or 1")
        require(self.dtype in DTYPES, "model.dtype", self.dtype, f"one of {', '.join(DTYPES)}")

    @property
    def num_router_outputs(self) -> int:
        """N + Z."""
        return self.n_routed_experts + self.zero_expert_num

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of what a cache holds per token and attention: normed, scaled latent and rotated
        rope key.
        """
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclasses.dataclass(frozen=True)
class ProxyConfig:
    """Widths of the proxy whose hyperparameters are transferred (section 3.1.1); 0: no transfer, s
    = 1.

    s of a matrix is the ratio of its fan-in to the proxy's. Where only `hidden_size` is given the
    other widths count as scaled with it.
    """

    hidden_size: int = 0
    num_attention_heads: int = 0
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    ffn_hidden_size: int = 0
    expert_ffn_hidden_size: int = 0

    def __post_init__(self) -> None:
        _not_negative("proxy", self, *(field.name for field in dataclasses.fields(self)))
        others = any(
            getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "hidden_size"
        )
        require(
            self.hidden_size > 0 or not others,
            "proxy.hidden_size",
            0,
            "> 0 where another proxy width is set",
        )

    def ratio(self, model: ModelConfig, field: str) -> float:
        """s of a matrix whose fan-in is proportional to `model.<field>`."""
        if not self.hidden_size:
            return 1.0
        width = getattr(self, field)
        return getattr(model, field) / width if width else model.hidden_size / self.hidden_size


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, in this order; their product is the number of devices used."""

    data: int = 1
    fsdp: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        _positive("mesh", self, *MESH_AXES)
        require(
            self.pipeline == 1, "mesh.pipeline", self.pipeline, "1 (this axis is not built yet)"
        )

    @property
    def batch_shards(self) -> int:
        """Parts that the batch is cut into."""
        return self.data * self.fsdp * self.expert

    @property
    def num_devices(self) -> int:
        """Product of all axes."""
        return self.batch_shards * self.pipeline * self.context


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How tokens reach experts on other devices (parallel/expert.py)."""

    expert_backend: str = "auto"
    """dense, allgather or all_to_all; auto: allgather where mesh.expert < 16, all_to_all from
    there.
    """
    token_chunks: int = 1
    """Parts of a device's tokens that travel one after the other, so that one part's exchange can
    hide behind the other's products.
    """
    dropless: bool | None = None
    """Room for the worst case, so that no selection is left out; None: where mesh.expert < 16."""
    capacity_factor: float = 1.5
    """Without `dropless`: room for this many times the selections that a balanced router makes
    within its budget model.moe_topk_real.
    """

    def __post_init__(self) -> None:
        require(
            self.expert_backend in EXPERT_BACKENDS,
            "parallel.expert_backend",
            self.expert_backend,
            f"one of {', '.join(EXPERT_BACKENDS)}",
        )
        _positive("parallel", self, "token_chunks", "capacity_factor")
        finite = math.isfinite(self.capacity_factor)
        require(finite, "parallel.capacity_factor", self.capacity_factor, "finite")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop. Batch sizes count sequences, lengths count tokens."""

    steps: int
    global_batch: int
    sequence_length: int
    accumulate: int = 1
    """Micro-batches per optimizer step; global_batch is the sum over them."""
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 0
    """Validation batches per evaluation; 0: all of them."""
    checkpoint_every: int = 100
    keep_last: int = 2
    keep_best: int = 1
    remat: str = "none"
    """Which activations the backward pass makes again: model/remat.py."""
    unroll: int = 1
    """Layers in one pass of the loop over layers, up to all of them. A loop copies weights out of
    their stack, and what the backward pass needs into one: without it a GPU's steps are faster, and
    compilation takes longer.
    """
    vocab_chunk: int = 8192
    """Columns of the unembedding per piece of the cross-entropy. Below the vocabulary no [tokens,
    vocabulary] array is ever whole; else there is one, and no logit is computed twice.
    """
    max_loss_rise: float = 2.0
    """Training stops when the loss stands this many nats above the median of the last 100 steps."""

    def __post_init__(self) -> None:
        _positive(
            "train",
            self,
            "steps",
            "global_batch",
            "sequence_length",
            "accumulate",
            "unroll",
            "log_every",
            "eval_every",
        )
        _positive("train", self, "checkpoint_every", "keep_last", "vocab_chunk", "max_loss_rise")
        _not_negative("train", self, "eval_batches", "keep_best")
        require(self.sequence_length >= 3, "train.sequence_length", self.sequence_length, ">= 3")
        require(
            self.remat in REMAT_POLICIES,
            "train.remat",
            self.remat,
            f"one of {', '.join(REMAT_POLICIES)}",
        )
        require(
            self.global_batch % self.accumulate == 0,
            "train.global_batch",
            self.global_batch,
            f"divisible by train.accumulate={self.accumulate}",
        )


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """Device-level load balance loss (section 2.2.3): weight and number of groups of real
    experts.
    """

    alpha: float = 1e-3
    groups: int = 1

    def __post_init__(self) -> None:
        _not_negative("optim.balance", self, "alpha")
        _positive("optim.balance", self, "groups")


@dataclasses.dataclass(frozen=True)
class PidConfig:
    """Controller of the router bias (section 2.1.1); (kp, mu, kd) = (0, mu, 0) is the paper's."""

    mu: float = 0.1
    mu_final: float = 0.01
    """mu falls linearly from `mu` to this over train.steps."""
    kp: float = 0.0
    kd: float = 0.0
    every: int = 1
    """Optimizer steps between bias updates; the loads in between are summed."""

    def __post_init__(self) -> None:
        _not_negative("optim.pid", self, "mu", "mu_final", "kp", "kd")
        _positive("optim.pid", self, "every")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and what stands around it. Rates are the proxy's: optim/width_scaling.py divides them
    by s.
    """

    learning_rate: float
    schedule: str = "wsd"
    warmup_steps: int = 0
    decay_steps: int = 0
    """Length of the last, linear phase of `wsd`; `cosine` decays from the warm-up's end to the last
    step.
    """
    final_scale: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    router_scale: float = 1.0
    """Further factor on the router's learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-16
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    mtp_weight: float = 0.1
    z_weight: float = 1e-6
    balance: BalanceConfig = BalanceConfig()
    pid: PidConfig = PidConfig()
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by shell patterns on their paths (docs/ARCHITECTURE.md):
    `("*/experts/*", "layers/mlp/router/*", "embed_tokens")`.
    """

    def __post_init__(self) -> None:
        _positive("optim", self, "learning_rate", "eps", "clip_norm")
        _not_negative(
            "optim",
            self,
            "warmup_steps",
            "decay_steps",
            "final_scale",
            "router_scale",
            "weight_decay",
        )
        _not_negative("optim", self, "mtp_weight", "z_weight")
        require(
            self.schedule in SCHEDULES,
            "optim.schedule",
            self.schedule,
            f"one of {', '.join(SCHEDULES)}",
        )
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """From `from_step` on, sources are mixed by these weights (tokens, normalised); 0 or absent:
    not used.
    """

    from_step: int
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        _not_negative("data.stages", self, "from_step")
        require(
            any(w > 0 for w in self.weights.values())
            and all(w >= 0 for w in self.weights.values()),
            "data.stages.weights",
            dict(self.weights),
            ">= 0 with at least one > 0",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read: named sources, their mixture, the tokenizer."""

    sources: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"python": "installed-python"}
    )
    """Name -> a directory made by `longcat prepare`, or `installed-python` (the environment's own
    Python source).
    """
    stages: tuple[StageConfig, ...] = ()
    """Mixtures over the course of training; empty: all sources with equal weight."""
    tokenizer: str = ""
    """A tokenizer.json; empty: the prepared sources' own, or a byte-level BPE of model.vocab_size
    entries trained on the default corpus.
    """
    corpus_mb: float = 30.0
    """Size of the `installed-python` training corpus, megabytes of text."""
    validation_mb: float = 0.3
    """Size of its validation part."""
    prefetch: int = 8
    """Batches made ahead of the step."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources", {}, "at least one name -> directory")
        _positive("data", self, "corpus_mb", "validation_mb")
        _not_negative("data", self, "prefetch")
        for stage in self.stages:
            for name in stage.weights:
                check_known(f"data.stages.weights.{name}", name, self.sources)
        starts = [stage.from_step for stage in self.stages]
        rising = starts == sorted(set(starts)) and starts[:1] in ([], [0])
        require(rising, "data.stages.from_step", starts, "rising, the first 0")


@dataclasses.dataclass(frozen=True)
class Config:
    """One training job."""

    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    parallel: ParallelConfig = ParallelConfig()
    proxy: ProxyConfig = ProxyConfig()
    seed: int = 0
    kernels: str = "auto"
    """Of training and evaluation. "auto": the best for the machine; "reference": plain jnp, to hold
    them against.
    """
    deterministic: bool = True
    """The same bits in every run. On a GPU XLA then takes the algorithm for a product that cuBLAS
    names, instead of measuring several at start, which may end otherwise the next time; all else is
    deterministic anyway.
    """
    init_from: str = ""
    """A checkpoint, trained or converted, whose parameters training starts from (fresh optimizer).
    The command line takes `model` from it, too.
    """

    def __post_init__(self) -> None:
        require(self.kernels in KERNELS, "kernels", self.kernels, f"one of {', '.join(KERNELS)}")
        self._check_batch()
        self._check_shards()
        groups, experts = self.optim.balance.groups, self.model.n_routed_experts
        require(
            experts % groups == 0,
            "optim.balance.groups",
            groups,
            f"a divisor of model.n_routed_experts={experts}",
        )
        # JAX would drop the upper bits: seed 2**32 would be seed 0.
        require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2**32 - 1")
        length, longest = self.train.sequence_length, self.model.max_position_embeddings
        require(
            length <= longest,
            "train.sequence_length",
            length,
            f"at most model.max_position_embeddings={longest}",
        )

    @property
    def loops_over_layers(self) -> bool:
        """Whether the step holds a loop over layers, not each of them by itself."""
        return self.train.unroll < self.model.num_layers

    def _check_batch(self) -> None:
        batch, parts = self.train.global_batch, self.train.accumulate * self.mesh.batch_shards
        require(
            batch % parts == 0,
            "train.global_batch",
            batch,
            f"divisible by accumulate * mesh.data * mesh.fsdp * mesh.expert = {parts}",
        )
        tokens = batch // parts * self.train.sequence_length // self.mesh.context
        require(
            tokens % self.parallel.token_chunks == 0,
            "parallel.token_chunks",
            self.parallel.token_chunks,
            f"a divisor of the {tokens} tokens that a device has of a micro-batch",
        )

    def _check_shards(self) -> None:
        dense, mesh = self.mesh.fsdp * self.mesh.expert, self.mesh
        for name in ("hidden_size", "q_lora_rank", "kv_lora_rank", "vocab_size"):
            size = getattr(self.model, name)
            require(
                size % dense == 0,
                f"model.{name}",
                size,
                f"divisible by mesh.fsdp * mesh.expert = {dense}",
            )
        length, context = self.train.sequence_length, mesh.context
        require(
            context == 1 or length % (2 * context) == 0,
            "train.sequence_length",
            length,
            f"divisible by 2 * mesh.context = {2 * context}",
        )
        experts = self.model.n_routed_experts
        require(
            experts % mesh.expert == 0,
            "model.n_routed_experts",
            experts,
            f"divisible by mesh.expert = {mesh.expert}",
        )


def from_mapping(mapping: Mapping[str, Any]) -> Config:
    """Validated `Config` of a nested mapping (a ConfigDict, or a parsed config.json).

    Raises:
      ConfigError: one line naming the field, the value and what is allowed.
    """
    return build(Config, mapping)
