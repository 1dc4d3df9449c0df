"""Which of our parameters is which HuggingFace tensor: one table for both directions.

HuggingFace keeps a linear as [out, in] and every layer's and expert's on its own; we keep [in, out]
and stack layers and experts. An expert's gate and up are the halves of our `gate_up_proj`.

The sizes in the table: D model, W vocabulary, Q query rank, C kv latent rank, A kv_a's C + P,
U q_b's H * (N + P), V kv_b's H * (N + V), O o_proj's H * V, F dense FFN, G expert FFN, E router
outputs.
"""

import dataclasses
from collections.abc import Iterator

from longcat_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the table; `{l}` and `{e}` stand for layer and expert."""

    path: str
    """Ours, `/` between levels."""
    name: str
    """HuggingFace's."""
    shape: str
    """HuggingFace's, a letter a dim."""
    half: int | None = None
    """Which half of our last dim the tensor is; None: all of it."""
    float32: bool = False
    """Kept in float32 whatever the model's dtype (SPEC: the router)."""
    lookup: bool = False
    """A table [W, D] that is looked up, not multiplied: not transposed."""

    @property
    def transposed(self) -> bool:
        """Whether our matrix is the transpose of HuggingFace's."""
        return len(self.shape) == 2 and not self.lookup

    @property
    def stacked(self) -> int:
        """Leading dims that ours has more: 0, 1 (layer) or 2 (layer, expert)."""
        return ("{l}" in self.name) + ("{e}" in self.name)


def _attention(path: str, name: str) -> tuple[Rule, ...]:
    shapes = {
        "q_a_proj": "QD",
        "q_a_layernorm": "Q",
        "q_b_proj": "UQ",
        "kv_a_proj_with_mqa": "AD",
        "kv_a_layernorm": "C",
        "kv_b_proj": "VC",
        "o_proj": "DO",
    }
    return tuple(Rule(f"{path}/{n}", f"{name}.{n}.weight", s) for n, s in shapes.items())


def _ffn(path: str, name: str) -> tuple[Rule, ...]:
    shapes = {"gate_proj": "FD", "up_proj": "FD", "down_proj": "DF"}
    return tuple(Rule(f"{path}/{n}", f"{name}.{n}.weight", s) for n, s in shapes.items())


_LAYER = "model.layers.{l}"
_MTP = "model.mtp.layers.0"
_NORMS = ("input_layernorm", "post_attention_layernorm")
_EXPERT = f"{_LAYER}.mlp.experts.{{e}}"

MAIN = (
    Rule("embed_tokens", "model.embed_tokens.weight", "WD", lookup=True),
    *(
        rule
        for i in (0, 1)
        for rule in (
            *(Rule(f"layers/{n}_{i}", f"{_LAYER}.{n}.{i}.weight", "D") for n in _NORMS),
            *_attention(f"layers/self_attn_{i}", f"{_LAYER}.self_attn.{i}"),
            *_ffn(f"layers/mlps_{i}", f"{_LAYER}.mlps.{i}"),
        )
    ),
    Rule(
        "layers/mlp/router/classifier",
        f"{_LAYER}.mlp.router.classifier.weight",
        "ED",
        float32=True,
    ),
    Rule(
        "layers/mlp/router/e_score_correction_bias",
        f"{_LAYER}.mlp.router.e_score_correction_bias",
        "E",
        float32=True,
    ),
    Rule("layers/mlp/experts/gate_up_proj", f"{_EXPERT}.gate_proj.weight", "GD", half=0),
    Rule("layers/mlp/experts/gate_up_proj", f"{_EXPERT}.up_proj.weight", "GD", half=1),
    Rule("layers/mlp/experts/down_proj", f"{_EXPERT}.down_proj.weight", "DG"),
    Rule("norm", "model.norm.weight", "D"),
    Rule("lm_head", "lm_head.weight", "WD"),
)
MTP = (
    # A table of its own: it may differ from the main one.
    Rule("mtp/embed_tokens", "model.mtp.embed_tokens.weight", "WD", lookup=True),
    Rule("mtp/enorm", f"{_MTP}.enorm.m.weight", "D"),
    Rule("mtp/hnorm", f"{_MTP}.hnorm.m.weight", "D"),
    Rule("mtp/eh_proj", f"{_MTP}.eh_proj.weight", "D2"),
    *(Rule(f"mtp/{n}", f"{_MTP}.{n}.weight", "D") for n in _NORMS),
    *_attention("mtp/self_attn", f"{_MTP}.self_attn"),
    *_ffn("mtp/mlp", f"{_MTP}.transformer_layer.mlp"),
    Rule("mtp/norm", "model.mtp.norm.weight", "D"),
)
MTP_PREFIX = "model.mtp."
PADDED = tuple(rule for rule in MAIN if rule.half is not None)
"""transformers >= 5 wants these of identity experts too; their values are never used."""


def dim_sizes(config: ModelConfig) -> dict[str, int]:
    """Size of every letter."""
    c = config
    return {
        "D": c.hidden_size,
        "2": 2 * c.hidden_size,
        "W": c.vocab_size,
        "Q": c.q_lora_rank,
        "C": c.kv_lora_rank,
        "A": c.latent_dim,
        "U": c.num_attention_heads * c.qk_head_dim,
        "V": c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim),
        "O": c.num_attention_heads * c.v_head_dim,
        "F": c.ffn_hidden_size,
        "G": c.expert_ffn_hidden_size,
        "E": c.num_router_outputs,
    }


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One HuggingFace tensor and its place in our tree."""

    rule: Rule
    name: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    """Layer and expert in our stacked array."""

    @property
    def offset(self) -> int:
        """First column of ours that the tensor fills."""
        return (self.rule.half or 0) * self.shape[0]


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The lines that a model has: with or without MTP."""
    return MAIN + MTP if config.num_nextn_predict_layers else MAIN


def array_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our path -> shape of the stacked array."""
    sizes, stack = dim_sizes(config), (config.num_layers, config.n_routed_experts)
    shapes = {}
    for rule in rules(config):
        own = tuple(sizes[letter] for letter in rule.shape)
        own = own[::-1] if rule.transposed else own
        if rule.half is not None:
            own = (*own[:-1], 2 * own[-1])
        shapes[rule.path] = stack[: rule.stacked] + own
    return shapes


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """Every HuggingFace tensor of the released layout, layer by layer, MTP last."""
    chosen = rules(config)
    yield from _expand(chosen[:1], config)
    layered = [rule for rule in chosen if rule.stacked]
    for layer in range(config.num_layers):
        yield from _expand(layered, config, layer)
    yield from _expand([rule for rule in chosen[1:] if not rule.stacked], config)


def _expand(
    chosen: tuple[Rule, ...] | list[Rule], config: ModelConfig, layer: int = 0
) -> Iterator[Tensor]:
    sizes = dim_sizes(config)
    for rule in chosen:
        shape = tuple(sizes[letter] for letter in rule.shape)
        for expert in range(config.n_routed_experts if rule.stacked == 2 else 1):
            index = (layer, expert)[: rule.stacked]
            yield Tensor(rule, rule.name.format(l=layer, e=expert), shape, index)


def padding(config: ModelConfig) -> Iterator[Tensor]:
    """The tensors that transformers >= 5 writes and wants for identity experts."""
    sizes = dim_sizes(config)
    for layer in range(config.num_layers):
        for expert in range(config.n_routed_experts, config.num_router_outputs):
            for rule in PADDED:
                shape = tuple(sizes[letter] for letter in rule.shape)
                name = rule.name.format(l=layer, e=expert)
                yield Tensor(rule, name, shape, (layer, expert))
