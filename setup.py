"""Packages longcat_jax and pallas_kernels; `make setup` installs both with [test,dev]."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"

setup(
    name="longcat_jax",
    version="0.1.0",
    description="LongCat-Flash in JAX: training, evaluation, sampling and Hopper kernels",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["longcat_jax*", "pallas_kernels*"]),
    python_requires=">=3.12",
    install_requires=[
        # Pallas Mosaic GPU and the split vjp use APIs that move between minor versions.
        "jax>=0.11.2,<0.12",
        "jaxlib>=0.11.2,<0.12",
        "array-record>=0.8",
        "chex>=0.1.92",
        "flax>=0.12.12",
        "grain>=0.2.18",
        "matplotlib>=3.10",
        "ml-collections>=1.1",
        "numpy>=2.2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "safetensors>=0.6",
        "tensorboardX>=2.6.4",
        "tensorstore>=0.1.80",
        "tokenizers>=0.22",
        "tqdm>=4.67",
        "zstandard>=0.23",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.11.2,<0.12"],
        # Kernels for GPUs before Hopper; imported only where they run. jax-triton reaches into
        # triton's compiler, which changes between minor versions.
        "triton": ["jax-triton>=0.3.1,<0.4", "triton>=3.6,<3.7"],
        # Compiles for GPUs on a machine without one. Not beside [cuda].
        "aot": [
            "jax-cuda12-plugin>=0.11.2,<0.12",
            "jax-cuda12-pjrt>=0.11.2,<0.12",
            "nvidia-cuda-nvcc-cu12>=12.6.85",
            "nvidia-cuda-nvdisasm>=13.0",  # tests/kernels/machine_code.py
        ],
        "test": ["pytest>=9.0", "pytest-xdist>=3.8"],
        # The formatter's output changes between minor versions: CI and contributors share one.
        "dev": ["ruff>=0.17.6,<0.18", "pre-commit>=4.0"],
    },
    entry_points={"console_scripts": ["longcat = longcat_jax.cli.main:main"]},
)
