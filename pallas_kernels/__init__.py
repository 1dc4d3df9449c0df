"""Kernels of LongCat-Flash: one folder per operator, each with a plain jnp reference of the same
signature.

Every operator is deterministic: the order of its sums is a function of shapes and indices only, and
no floating-point scatter appears in its value or its gradients. `implementation=None` picks the
best one for the platform; a named one is used or refused with a ValueError, never replaced.
"""

from pallas_kernels._common import HOPPER, KINDS, RESULT, kernels, made_for
from pallas_kernels.add_norm import add_norm
from pallas_kernels.flash_mla import flash_mla
from pallas_kernels.gather_combine import gather_combine, gather_rows, gather_sum
from pallas_kernels.grouped_gemm import grouped_gemm, grouped_gemm_weight_gradient
from pallas_kernels.grouped_gemm_fp8 import grouped_gemm_fp8, quantize_rows, quantize_weights
from pallas_kernels.grouped_swiglu import grouped_swiglu
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_heads import absorb_query, expand_values
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.scatter_add import scatter_add
from pallas_kernels.skinny_ffn import skinny_experts, skinny_swiglu
from pallas_kernels.skinny_gemm import skinny_gemm

__all__ = [
    "HOPPER",
    "KINDS",
    "RESULT",
    "absorb_query",
    "add_norm",
    "expand_values",
    "flash_mla",
    "gather_combine",
    "gather_rows",
    "gather_sum",
    "grouped_gemm",
    "grouped_gemm_fp8",
    "grouped_gemm_weight_gradient",
    "grouped_swiglu",
    "kernels",
    "made_for",
    "mla_decode",
    "quantize_rows",
    "quantize_weights",
    "rms_norm",
    "scatter_add",
    "skinny_experts",
    "skinny_gemm",
    "skinny_swiglu",
]
