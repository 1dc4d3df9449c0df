"""How the Mosaic grouped GEMM cuts up its products.

From times on one NVIDIA H100 80GB HBM3 (experiments/LOG.md); `python -m experiments.bench.tune
--write` replaces this module.
"""

from pallas_kernels.grouped_gemm.schedule import Tiling

# (pass, (rows, contract, width, groups) of the forward product): for a shape where another tiling
# than the pass' own, under None, was faster by more than the noise.
TILINGS = {
    ("forward", None): Tiling(panel=8, pair="columns"),
    ("gradient to lhs", None): Tiling(panel=8, pair="columns"),
    ("gradient to rhs", None): Tiling(panel=8, pair="rows"),
}
