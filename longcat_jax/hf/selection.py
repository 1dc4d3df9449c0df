"""`--slice layers=0:2,experts=0:64`: a small consistent model out of a big one.

The chosen layers and real experts are numbered from 0 again; all identity experts stay, so the
router keeps the rows of the chosen real experts and of every identity expert.
"""

import dataclasses
import re

import numpy as np

from longcat_jax.config import ConfigError, ModelConfig
from longcat_jax.hf.layout import Tensor
from longcat_jax.hf.safetensors import HFError


@dataclasses.dataclass(frozen=True)
class Selection:
    """Half-open ranges; None: all."""

    layers: tuple[int, int] | None = None
    experts: tuple[int, int] | None = None


def parse(text: str) -> Selection:
    """A `--slice` option.

    Raises:
      HFError: not of the form `layers=0:2,experts=0:64`, either part optional.
    """
    ranges: dict[str, tuple[int, int]] = {}
    for part in text.split(","):
        found = re.fullmatch(r"(layers|experts)=(\d+):(\d+)", part.strip())
        if not found or found[1] in ranges or int(found[2]) >= int(found[3]):
            raise HFError(f"--slice={text}: write layers=0:2,experts=0:64, or one of the two")
        ranges[found[1]] = (int(found[2]), int(found[3]))
    return Selection(**ranges)


def shrink(config: ModelConfig, selection: Selection) -> ModelConfig:
    """The config of the chosen part; K_e is lowered where fewer experts are left.

    Raises:
      HFError: the model has no such layers or experts, or too few are left for its top-k.
    """
    sizes = {"layers": config.num_layers, "experts": config.n_routed_experts}
    counts = dict(sizes)
    for name, size in sizes.items():
        chosen = getattr(selection, name)
        if chosen is not None:
            if chosen[1] > size:
                raise HFError(f"--slice: {name}={chosen[0]}:{chosen[1]} of a model with {size}")
            counts[name] = chosen[1] - chosen[0]
    try:
        return dataclasses.replace(
            config,
            num_layers=counts["layers"],
            n_routed_experts=counts["experts"],
            moe_topk_real=min(config.moe_topk_real, counts["experts"]),
        )
    except ConfigError as error:
        raise HFError(f"--slice: {error}") from error


def source_of(tensor: Tensor, selection: Selection, full: ModelConfig) -> Tensor:
    """The tensor of the whole model that a tensor of the chosen part is, or is cut from."""
    first = [(chosen or (0, 0))[0] for chosen in (selection.layers, selection.experts)]
    index = tuple(i + start for i, start in zip(tensor.index, first, strict=False))
    layer, expert = (*index, 0, 0)[:2]
    shape = tensor.shape
    if router_rows(tensor, selection, full) is not None:
        shape = (full.num_router_outputs, *shape[1:])
    return Tensor(tensor.rule, tensor.rule.name.format(l=layer, e=expert), shape, index)


def router_rows(tensor: Tensor, selection: Selection, full: ModelConfig) -> np.ndarray | None:
    """Rows to keep of a router's tensor; None for all others."""
    if not tensor.rule.shape.startswith("E") or selection.experts is None:
        return None
    identity = np.arange(full.n_routed_experts, full.num_router_outputs)
    return np.concatenate([np.arange(*selection.experts), identity])
