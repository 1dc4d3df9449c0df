"""Shapes of the grouped GEMM in fp8 that tests and benchmarks share."""

from pallas_kernels.grouped_gemm import shapes

PRODUCTION = shapes.PRODUCTION
