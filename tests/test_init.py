"""The package's public names, and that importing it costs nothing."""

import subprocess
import sys

import pytest

import longcat_jax as lc
from longcat_jax.checkpoint import load
from longcat_jax.inference.forward import forward
from longcat_jax.inference.generate import generate


def test_public_names_are_the_functions() -> None:
    assert (lc.load, lc.forward, lc.generate) == (load, forward, generate)
    assert set(lc.__all__) <= set(dir(lc))
    assert all(getattr(lc, name).__name__ == name for name in lc.__all__)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'longcat_jax' has no attribute 'generat'"):
        _ = lc.generat


def test_import_is_light() -> None:
    code = (
        "import sys, longcat_jax, longcat_jax.cli.generate; dir(longcat_jax);"
        "heavy = {'jax', 'numpy', 'flax', 'pallas_kernels'} & set(sys.modules);"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
