"""Which implementation an operator takes, on machines of every kind."""

import importlib.machinery
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _common, gather_rows, grouped_gemm, scatter_add

WIDTH = 128


def misfit(width):
    return "" if width == WIDTH else f"takes width {WIDTH}, got {width}"


KERNELS = {
    "reference": _common.Implementation(lambda: "reference"),
    "mosaic": _common.Implementation(lambda: "mosaic", misfit),
    "triton": _common.Implementation(lambda: "triton", misfit),
}


def choose(implementation, width=WIDTH, available=KERNELS):
    return _common.choose("operator", implementation, available, width)()


@pytest.fixture
def machine(monkeypatch):
    """Sets the GPU's compute capability, None for none, and whether jax_triton is installed."""

    def set_machine(capability, *, jax_triton=True):
        module = types.ModuleType("jax_triton")
        module.__spec__ = importlib.machinery.ModuleSpec("jax_triton", None)
        monkeypatch.setitem(sys.modules, "jax_triton", module if jax_triton else None)
        monkeypatch.setattr(_common, "compute_capability", lambda: capability)

    return set_machine


@pytest.mark.parametrize(
    "capability, name",
    [
        (None, "reference"),
        ((0, 0), "reference"),
        ((7, 5), "reference"),
        ((8, 0), "triton"),
        ((8, 6), "triton"),
        ((8, 9), "triton"),
        ((9, 0), "mosaic"),
        ((10, 0), "reference"),
    ],
)
def test_the_best_for_the_machine(machine, capability, name):
    machine(capability)
    assert choose(None) == name
    assert choose(None, width=5) == "reference"
    assert choose(None, available={"reference": KERNELS["reference"]}) == "reference"


@pytest.mark.parametrize(
    "name, capability, message",
    [
        ("triton", None, "needs an NVIDIA GPU of compute capability 8.0 or higher, found none"),
        ("triton", (7, 5), "needs an NVIDIA GPU of compute capability 8.0 or higher, found 7.5"),
        ("mosaic", (8, 9), r"needs a GPU of compute capability 9.0 \(Hopper\), found 8.9"),
        ("mosaic", (10, 0), "found 10.0"),
        ("cutlass", (9, 0), "'cutlass' is not available, choose None or one of 'reference', 'mos"),
    ],
)
def test_a_named_one_never_falls_back(machine, name, capability, message):
    machine(capability)
    with pytest.raises(ValueError, match=message) as error:
        choose(name)
    assert str(error.value).startswith("operator: implementation=")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, capability", [("mosaic", (9, 0)), ("triton", (8, 0))])
def test_a_named_one_takes_the_operands_or_refuses(machine, name, capability):
    machine(capability)
    assert choose(name) == name
    with pytest.raises(ValueError, match=f'="{name}" takes width 128, got 5; choose None or'):
        choose(name, width=5)


def test_named_kernels_of_other_machines(machine):
    machine((9, 0))
    assert choose("triton") == "triton"
    machine((8, 0))
    assert choose("reference") == "reference"
    machine(None)
    assert choose("mosaic") == "mosaic"  # lowered or interpreted


def call(operator, implementation, dtype=jnp.bfloat16, width=WIDTH):
    rows, slots = jnp.zeros((6, width), dtype), jnp.zeros((6, 1), int)
    if operator is grouped_gemm:
        weights, sizes = jnp.zeros((2, width, 24), dtype), jnp.asarray([1, 3])
        return grouped_gemm(rows, weights, sizes, implementation=implementation)
    if operator is gather_rows:
        return gather_rows(rows, slots[:, 0], slots, implementation=implementation)
    return scatter_add(rows, slots[:, 0], 4, implementation=implementation)


OPERATORS = (grouped_gemm, gather_rows, scatter_add)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("implementation", [None, "triton"])
def test_a_missing_package_is_named(machine, operator, implementation):
    machine((8, 0), jax_triton=False)
    message = r"needs the package jax_triton: pip install 'longcat_jax\[triton\]'; choose"
    with pytest.raises(ValueError, match=f"{operator.__name__}: .*{message}"):
        call(operator, implementation)
    # Neither the reference nor operands that the kernel does not take need it.
    jax.eval_shape(lambda: call(operator, "reference"))
    with jax.enable_x64(True):
        jax.eval_shape(lambda: call(operator, None, jnp.float64))


@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_needs_a_gpu(machine, operator):
    machine(None)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        call(operator, "triton")


@pytest.mark.parametrize(
    "operator, dtype, width, message",
    [
        (grouped_gemm, jnp.float32, 128, "multiples of 8, got float32, 128 and 24"),
        (grouped_gemm, jnp.bfloat16, 12, "multiples of 8, got bfloat16, 12 and 24"),
        (gather_rows, jnp.float16, 0, "at least one column, got float16 and 0"),
        (scatter_add, jnp.bfloat16, 0, "at least one column, got bfloat16 and 0"),
    ],
)
def test_triton_refuses_operands(machine, operator, dtype, width, message):
    machine((8, 6))
    with pytest.raises(ValueError, match=message):
        call(operator, "triton", dtype, width)


@pytest.mark.parametrize(
    "backend, text, capability",
    [
        ("gpu", "8.6", (8, 6)),
        ("gpu", "10.0", (10, 0)),
        ("gpu", "gfx942", (0, 0)),
        ("cpu", "9.0", None),
    ],
)
def test_compute_capability_is_the_devices(monkeypatch, backend, text, capability):
    device = types.SimpleNamespace(compute_capability=text)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert _common.compute_capability() == capability


def test_made_for_another_machine(machine):
    with _common.made_for(_common.HOPPER):
        assert _common.compute_capability() == _common.HOPPER
        assert choose(None) == "mosaic"
    assert choose(None) == "reference"


def test_reference_kernels_where_none_is_named(machine):
    machine(_common.HOPPER)
    with _common.kernels("reference"):
        assert choose(None) == "reference"
        assert choose("mosaic") == "mosaic"
    assert choose(None) == "mosaic"
    with pytest.raises(ValueError, match="choose one of auto, reference"), _common.kernels("best"):
        pass
