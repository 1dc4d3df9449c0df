"""Compares what a checkpoint holds with what its config.json promises, before a byte is written."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from longcat_jax.config import ModelConfig
from longcat_jax.hf import layout
from longcat_jax.hf.safetensors import FP8, Entry, HFError

SCALE = "_scale_inv"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Names found against names expected."""

    expected: int
    """Tensors that the model needs."""
    present: int
    """Those of them that are there, of the right shape."""
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshapen: tuple[str, ...]
    """`name [found], expected [shape]`."""
    wrong_dtype: tuple[str, ...]
    padded: int
    """Unused gate and up matrices of identity experts, as transformers >= 5 writes them."""
    scales: int
    """fp8 scales."""

    def problems(self) -> list[str]:
        """A phrase per kind of problem, with the first case of each."""
        kinds = {
            "missing": self.missing,
            "unknown": self.extra,
            "of the wrong shape": self.misshapen,
            "of the wrong dtype": self.wrong_dtype,
        }
        return [
            f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {kind} ({names[0]}"
            f"{', ...' if len(names) > 1 else ''})"
            for kind, names in kinds.items()
            if names
        ]

    def require(self, directory: Path) -> None:
        """Raises HFError with one line unless everything fits."""
        if self.problems():
            raise HFError(f"{directory}: {'; '.join(self.problems())}")


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of an fp8 matrix; the last block of a dim may be partial."""
    return tuple(math.ceil(size / step) for size, step in zip(shape, block, strict=True))


def compare(
    entries: Mapping[str, Entry], config: ModelConfig, block: tuple[int, int] | None
) -> Comparison:
    """Names, shapes and dtypes of files against the model's.

    Args:
      entries: what the files hold.
      config: the model.
      block: rows and columns that share an fp8 scale; None: the config speaks of no fp8.
    """
    expected = {tensor.name: tensor for tensor in layout.tensors(config)}
    optional = {tensor.name: tensor for tensor in layout.padding(config)}
    misshapen, wrong_dtype, scales = [], [], {}
    for name, tensor in (expected | optional).items():
        entry = entries.get(name)
        if entry is None:
            continue
        if entry.shape != tensor.shape:
            misshapen.append(f"{name} {list(entry.shape)}, expected {list(tensor.shape)}")
        elif entry.dtype == FP8 and block and tensor.rule.transposed and not tensor.rule.float32:
            scales[name + SCALE] = scale_shape(entry.shape, block)
        elif entry.dtype == FP8:
            why = "" if block else ", and config.json has no quantization_config"
            wrong_dtype.append(f"{name} is fp8{why}")
    missing = [name for name in (*expected, *scales) if name not in entries]
    for name, shape in scales.items():
        if name in entries and entries[name].shape != shape:
            misshapen.append(f"{name} {list(entries[name].shape)}, expected {list(shape)}")
    known = expected.keys() | optional.keys() | scales.keys()
    return Comparison(
        expected=len(expected),
        present=sum(name in entries for name in expected),
        missing=tuple(missing),
        extra=tuple(name for name in entries if name not in known),
        misshapen=tuple(misshapen),
        wrong_dtype=tuple(wrong_dtype),
        padded=sum(name in entries for name in optional),
        scales=len(scales),
    )
