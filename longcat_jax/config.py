"""The job's configuration: frozen dataclasses that validate themselves.

A file in configs/ returns an `ml_collections.ConfigDict`; `from_mapping` turns it (or a saved
config.json) into a `Config`. Everything past the entry point sees dataclasses only. Defaults live
here and nowhere else. Field names of `ModelConfig` are HuggingFace's (config.json of the released
checkpoint), see SPEC table in docs/ARCHITECTURE.md.

Every check raises `ConfigError` with one line: the field, the value, what is allowed.
"""

import ast
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

DTYPES = ("bfloat16", "float16", "float32", "float64")
REMAT_POLICIES = ("none", "dots", "full")
SCHEDULES = ("wsd", "cosine")
MESH_AXES = ("data", "fsdp", "pipeline", "context", "expert")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one line meant for the user."""


def _require(condition: bool, field: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{field}={value!r}: must be {allowed}")


def _positive(prefix: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value > 0, f"{prefix}.{name}", value, "> 0")


def _not_negative(prefix: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 0, f"{prefix}.{name}", value, ">= 0")


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
        _require(self.type == "yarn", "model.rope_scaling.type", self.type, "'yarn'")
        _require(self.factor >= 1, "model.rope_scaling.factor", self.factor, ">= 1")
        _positive("model.rope_scaling", self, "original_max_position_embeddings", "beta_slow")
        faster = self.beta_fast > self.beta_slow
        _require(faster, "model.rope_scaling.beta_fast", self.beta_fast, "> beta_slow")
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
        _require(even, "model.qk_rope_head_dim", self.qk_rope_head_dim, "even (rotated in pairs)")
        total = self.num_router_outputs
        _require(
            self.moe_topk <= total,
            "model.moe_topk",
            self.moe_topk,
            f"at most n_routed_experts + zero_expert_num = {total}",
        )
        most = min(self.moe_topk, self.n_routed_experts)
        _require(
            0 < self.moe_topk_real <= most,
            "model.moe_topk_real",
            self.moe_topk_real,
            f"above 0 and at most min(moe_topk, n_routed_experts) = {most}",
        )
        _require(
            self.zero_expert_num > 0 or self.moe_topk_real == self.moe_topk,
            "model.moe_topk_real",
            self.moe_topk_real,
            f"moe_topk = {self.moe_topk} where zero_expert_num is 0",
        )
        nextn = self.num_nextn_predict_layers
        _require(nextn in (0, 1), "model.num_nextn_predict_layers", nextn, "0 or 1")
        _require(self.dtype in DTYPES, "model.dtype", self.dtype, f"one of {', '.join(DTYPES)}")

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
        _require(
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
        for name in ("pipeline", "context"):
            _require(
                getattr(self, name) == 1,
                f"mesh.{name}",
                getattr(self, name),
                "1 (this axis is not built yet)",
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
    vocab_chunk: int = 8192
    """Columns of the unembedding per piece of the cross-entropy: no [tokens, vocabulary] array is
    ever whole.
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
            "log_every",
            "eval_every",
        )
        _positive("train", self, "checkpoint_every", "keep_last", "vocab_chunk", "max_loss_rise")
        _not_negative("train", self, "eval_batches", "keep_best")
        _require(self.sequence_length >= 3, "train.sequence_length", self.sequence_length, ">= 3")
        _require(
            self.remat in REMAT_POLICIES,
            "train.remat",
            self.remat,
            f"one of {', '.join(REMAT_POLICIES)}",
        )
        _require(
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
        _require(
            self.schedule in SCHEDULES,
            "optim.schedule",
            self.schedule,
            f"one of {', '.join(SCHEDULES)}",
        )
        for name in ("beta1", "beta2"):
            _require(
                0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)"
            )


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """From `from_step` on, sources are mixed by these weights (tokens, normalised); 0 or absent:
    not used.
    """

    from_step: int
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        _not_negative("data.stages", self, "from_step")
        _require(
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
    """A tokenizer.json; empty: a byte-level BPE of model.vocab_size entries is trained on the first
    source.
    """
    corpus_mb: float = 30.0
    """Size of the `installed-python` training corpus, megabytes of text."""
    validation_mb: float = 0.3
    """Size of its validation part."""
    shuffle_buffer: int = 0
    prefetch: int = 8
    """Batches made ahead of the step."""

    def __post_init__(self) -> None:
        _require(len(self.sources) > 0, "data.sources", {}, "at least one name -> directory")
        _positive("data", self, "corpus_mb", "validation_mb")
        _not_negative("data", self, "shuffle_buffer", "prefetch")
        for stage in self.stages:
            for name in stage.weights:
                _check_known(f"data.stages.weights.{name}", name, self.sources)
        starts = [stage.from_step for stage in self.stages]
        rising = starts == sorted(set(starts)) and starts[:1] in ([], [0])
        _require(rising, "data.stages.from_step", starts, "rising, the first 0")


@dataclasses.dataclass(frozen=True)
class Config:
    """One training job."""

    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    proxy: ProxyConfig = ProxyConfig()
    seed: int = 0
    init_from: str = ""
    """A checkpoint whose parameters training starts from (fresh optimizer)."""

    def __post_init__(self) -> None:
        self._check_batch()
        self._check_shards()
        groups, experts = self.optim.balance.groups, self.model.n_routed_experts
        _require(
            experts % groups == 0,
            "optim.balance.groups",
            groups,
            f"a divisor of model.n_routed_experts={experts}",
        )
        # JAX would drop the upper bits: seed 2**32 would be seed 0.
        _require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2**32 - 1")
        length, longest = self.train.sequence_length, self.model.max_position_embeddings
        _require(
            length <= longest,
            "train.sequence_length",
            length,
            f"at most model.max_position_embeddings={longest}",
        )

    def _check_batch(self) -> None:
        batch, parts = self.train.global_batch, self.train.accumulate * self.mesh.batch_shards
        _require(
            batch % parts == 0,
            "train.global_batch",
            batch,
            f"divisible by accumulate * mesh.data * mesh.fsdp * mesh.expert = {parts}",
        )

    def _check_shards(self) -> None:
        dense, mesh = self.mesh.fsdp * self.mesh.expert, self.mesh
        for name in ("hidden_size", "q_lora_rank", "kv_lora_rank", "vocab_size"):
            size = getattr(self.model, name)
            _require(
                size % dense == 0,
                f"model.{name}",
                size,
                f"divisible by mesh.fsdp * mesh.expert = {dense}",
            )
        experts = self.model.n_routed_experts
        _require(
            experts % mesh.expert == 0,
            "model.n_routed_experts",
            experts,
            f"divisible by mesh.expert = {mesh.expert}",
        )


def _check_known(path: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if name in known:
        return
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
    raise ConfigError(f"{path}: unknown name{hint}")


def _plain(value: Any) -> Any:
    """ConfigDict, FrozenConfigDict and other mappings as dicts."""
    return dict(value.items()) if hasattr(value, "items") else value


def _convert(kind: Any, value: Any, path: str) -> Any:
    """`value` as the annotated type `kind`, or a ConfigError that names `path`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, path)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path)
    value = _plain(value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {str(k): _convert(arguments[1], v, f"{path}.{k}") for k, v in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        _require(math.isfinite(value), path, value, "a finite number")
        return float(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    name = (
        getattr(kind, "__name__", None)
        if origin is None
        else {tuple: "list", Mapping: "mapping"}.get(origin)
    )
    raise ConfigError(f"{path}={value!r}: must be of type {name}, not {type(value).__name__}")


def _build(kind: type, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(value):
        return value
    value = _plain(value)
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path}={value!r}: must be a section with fields, not {type(value).__name__}"
        )
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    prefix = f"{path}." if path else ""
    for name in value:
        _check_known(f"{prefix}{name}", name, fields)
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in value:
            raise ConfigError(f"{prefix}{name}: missing; it has no default")
    return kind(
        **{name: _convert(hints[name], item, f"{prefix}{name}") for name, item in value.items()}
    )


def from_mapping(mapping: Mapping[str, Any]) -> Config:
    """Validated `Config` of a nested mapping (a ConfigDict, or a parsed config.json).

    Raises:
      ConfigError: one line naming the field, the value and what is allowed.
    """
    return _build(Config, mapping, "")


def to_mapping(config: Any) -> dict[str, Any]:
    """Nested dict of plain values, every default written out; `from_mapping` reads it back."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_mapping(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_mapping(item) for item in config]
    return dict(config) if isinstance(config, Mapping) else config


def override(config: Config, assignments: Sequence[str]) -> Config:
    """`config` with `path=value` assignments applied, e.g. `model.num_layers=4`; values are Python
    literals or text.

    Raises:
      ConfigError: an unknown path, or a value that doesn't fit.
    """
    mapping = to_mapping(config)
    for assignment in assignments:
        path, _, text = assignment.partition("=")
        node, kind = mapping, Config
        *parents, leaf = path.split(".")
        for depth, name in enumerate(parents):
            _check_known(path, name, node)
            kind = typing.get_type_hints(kind)[name] if dataclasses.is_dataclass(kind) else None
            if not isinstance(node[name], dict):
                raise ConfigError(f"{path}: {'.'.join(parents[: depth + 1])} has no fields")
            node = node[name]
        if dataclasses.is_dataclass(kind):
            _check_known(path, leaf, node)
            node[leaf] = _parse(text, typing.get_type_hints(kind)[leaf])
        else:
            node[leaf] = _parse(text, None)
    return from_mapping(mapping)


def _parse(text: str, kind: Any) -> Any:
    """A command line's text as a value: left as it is for strings, a literal otherwise."""
    if kind is str:
        return text
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`path: old -> new` of every leaf in which two `to_mapping` results differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in differences(
                old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key
            )
        ]
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
