"""The Triton kernels: lowered for CUDA where jax_triton is installed, run where there is a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    _common,
    gather_rows,
    grouped_gemm,
    grouped_gemm_weight_gradient,
    scatter_add,
)
from pallas_kernels.gather_combine import shapes as gather_shapes
from pallas_kernels.grouped_gemm import shapes as grouped_shapes
from pallas_kernels.scatter_add import shapes as scatter_shapes
from tests.kernels import helpers, scatter_order

triton_lib = pytest.importorskip(
    "jax_triton.triton_lib",
    reason="needs the extra [triton] beside JAX with GPU support",
    exc_type=ImportError,
)

ROUNDING = {"bfloat16": 3e-3, "float16": 4e-4}
product = functools.partial(grouped_gemm, implementation="triton")
sums = functools.partial(scatter_add, implementation="triton")
rows = functools.partial(gather_rows, implementation="triton")


def spec(*dims, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(dims, dtype)


def kernels(function, *args):
    """Number of Triton kernels in the function lowered for CUDA, which compiles them to PTX."""
    lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("triton_kernel_call")


# Shared memory that a program may have, in KiB, by compute capability (CUDA programming guide).
SHARED = {(8, 0): 163, (8, 9): 99, (9, 0): 227}


@pytest.fixture(params=SHARED, ids=lambda c: f"sm{c[0]}{c[1]}")
def machine(request, monkeypatch):
    """A GPU to lower for; every kernel must fit into its shared memory."""
    compile_to_ptx = triton_lib.compile_ttir_to_ptx_inplace

    def compile_and_check(*args):
        result = compile_to_ptx(*args)
        assert result.shared_mem_bytes <= SHARED[request.param] * 1024, result.name
        return result

    monkeypatch.setattr(_common, "compute_capability", lambda: request.param)
    monkeypatch.setattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})
    monkeypatch.setattr(triton_lib, "compile_ttir_to_ptx_inplace", compile_and_check)
    jax.clear_caches()  # of functions traced for another machine


def product_and_gradients(lhs, rhs, sizes, dout):
    out, vjp = jax.vjp(lambda lhs, rhs: product(lhs, rhs, sizes), lhs, rhs)
    return out, *vjp(dout)


@pytest.mark.parametrize("shape", grouped_shapes.PRODUCTION[:1] + grouped_shapes.QUICKSTART[:1])
def test_grouped_gemm_lowers_for_cuda(machine, shape):
    num_rows, contract, width, groups = shape
    args = spec(num_rows, contract), spec(groups, contract, width), spec(groups, dtype="int32")
    assert kernels(product_and_gradients, *args, spec(num_rows, width)) == 3


@pytest.mark.parametrize("shape", (scatter_shapes.EMBEDDING, scatter_shapes.QUICKSTART))
def test_scatter_add_lowers_for_cuda(machine, shape):
    num_rows, width, destinations = shape
    run = functools.partial(sums, num_rows=destinations)
    count = kernels(run, spec(num_rows, width), spec(num_rows, dtype="int32"))
    assert count == (3 if num_rows >= 2048 else 2)


def test_dispatch_lowers_for_cuda(machine):
    tokens, selected, width = gather_shapes.PRODUCTION[0]
    token_of_row = spec(tokens * selected, dtype="int32")
    args = spec(tokens, width), token_of_row, spec(tokens, selected, dtype="int32")
    assert kernels(rows, *args) == 1


def test_lowers_inside_shard_map(machine):
    """With types checked: unchecked, gradients through psum are wrong."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    def gradients(rhs, lhs, sizes):
        def loss(rhs, lhs):
            out = product(lhs, rhs, sizes)
            ids = sizes[jnp.arange(out.shape[0]) % sizes.shape[0]]
            return jnp.sum(sums(out, ids, 5))

        value, drhs = jax.value_and_grad(loss)(rhs, lhs)
        return drhs, value[None], rows(lhs, sizes, sizes[:, None])

    split = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P(), P("data"), P("data")),
    )
    args = spec(256, 64, 96), spec(256, 64), spec(256, dtype="int32")
    assert kernels(split, *args) == 5


GROUPS = {
    "uneven": (67, 0, 1, 20, 300),
    "all rows": (129, 255, 128),
    "no rows": (0, 0, 0),
    "one": (512,),
}
ROWS = 512


def exact_product_and_gradients(lhs, rhs, sizes, dout):
    """In float64; rows past the sum have no part."""
    lhs, rhs, dout = (np.asarray(x, np.float64) for x in (lhs, rhs, dout))
    out, dlhs, drhs = np.zeros_like(dout), np.zeros_like(lhs), np.zeros_like(rhs)
    start = 0
    for g, size in enumerate(sizes):
        mine = slice(start, start + size)
        out[mine], dlhs[mine] = lhs[mine] @ rhs[g], dout[mine] @ rhs[g].T
        drhs[g] = lhs[mine].T @ dout[mine]
        start += size
    return out, dlhs, drhs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, contract, width", [("bfloat16", 256, 384), ("float16", 200, 72)])
@pytest.mark.parametrize("groups", GROUPS)
def test_grouped_gemm_equals_naive(groups, dtype, contract, width):
    sizes, rng = GROUPS[groups], np.random.default_rng(0)
    shapes = (ROWS, contract), (len(sizes), contract, width), (ROWS, width)
    lhs, rhs, dout = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
    expected = exact_product_and_gradients(lhs, rhs, sizes, dout)
    total = sum(sizes)
    args = lhs.at[total:].set(jnp.nan), rhs, jnp.asarray(sizes), dout.at[total:].set(jnp.nan)
    actual = jax.jit(product_and_gradients)(*args)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert helpers.relative_error(got, want) <= ROUNDING[dtype]
    assert not np.any(actual[0][total:]) and not np.any(actual[1][total:])
    assert helpers.same_bits(actual, jax.jit(product_and_gradients)(*args))


@pytest.mark.gpu
def test_grouped_gemm_sums_in_float32():
    """Results that leave the kernels unrounded, and a gradient added to a sum."""
    sizes, rng = GROUPS["uneven"], np.random.default_rng(1)
    shapes = (ROWS, 128), (len(sizes), 128, 64), (ROWS, 64)
    lhs, rhs, dout = (jnp.asarray(rng.standard_normal(s), "bfloat16") for s in shapes)
    before = jnp.asarray(rng.standard_normal(shapes[1]), "float32")
    expected_out, _, expected_drhs = exact_product_and_gradients(lhs, rhs, sizes, dout)
    sizes = jnp.asarray(sizes)
    out = product(lhs, rhs, sizes, out_dtype="float32")
    assert helpers.relative_error(out, expected_out) <= 1e-6
    total = grouped_gemm_weight_gradient(
        lhs, dout, sizes, accumulate_GKN=before, implementation="triton"
    )
    assert helpers.relative_error(total, expected_drhs + np.asarray(before)) <= 1e-6


def ids_of(case, num_rows, destinations):
    rng = np.random.default_rng(3)
    ids = rng.integers(0, destinations, num_rows)
    if case == "half on one":
        ids[rng.permutation(num_rows)[: num_rows // 2]] = 3
    if case == "all on the last":
        ids[:] = destinations - 1
    if case == "some dropped":
        ids[::7], ids[::11] = -1, destinations
    return ids


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, width", [("bfloat16", 640), ("float32", 128), ("float16", 37)])
@pytest.mark.parametrize("case", ["uniform", "half on one", "all on the last", "some dropped"])
def test_scatter_add_adds_in_its_order(case, dtype, width):
    num_rows, destinations = 5000, 70
    ids = ids_of(case, num_rows, destinations)
    draw = helpers.values_of_many_magnitudes(np.random.default_rng(4), num_rows, width)
    values = jnp.asarray(draw, dtype)
    run = jax.jit(functools.partial(sums, num_rows=destinations))
    out = run(values, jnp.asarray(ids, jnp.int32))
    expected = scatter_order.sum_by_id(np.asarray(values, np.float32), ids, destinations)
    assert helpers.same_bits(out, expected)


@pytest.mark.gpu
def test_scatter_add_has_the_bits_of_mosaic():
    if _common.compute_capability() != _common.HOPPER:
        pytest.skip("Mosaic's kernels need Hopper")
    shape = scatter_shapes.Shape(9000, 640, 500)
    ids = jnp.asarray(ids_of("half on one", shape.rows, shape.destinations), jnp.int32)
    draw = helpers.values_of_many_magnitudes(np.random.default_rng(5), shape.rows, shape.width)
    values = jnp.asarray(draw, jnp.bfloat16)
    mosaic = scatter_add(values, ids, shape.destinations, implementation="mosaic")
    assert helpers.same_bits(sums(values, ids, shape.destinations), mosaic)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, width", [("bfloat16", 6144), ("float32", 96), ("float16", 5)])
def test_dispatch_equals_reference(dtype, width):
    tokens, selected, num_rows = 190, 3, 700
    rng = np.random.default_rng(2)
    slots = rng.permutation(num_rows)[: tokens * selected].reshape(tokens, selected)
    slots[0, 1], slots[5] = num_rows, -1
    token_of_row = np.full(num_rows, tokens)
    for (t, _), slot in np.ndenumerate(slots):
        if 0 <= slot < num_rows:
            token_of_row[slot] = t
    token_of_row[slots[7, 0]] = -1
    draw = helpers.values_of_many_magnitudes
    x, drows = (jnp.asarray(draw(rng, n, width), dtype) for n in (tokens, num_rows))
    indices = jnp.asarray(token_of_row, jnp.int32), jnp.asarray(slots, jnp.int32)

    def run(gather):
        routed, vjp = jax.vjp(lambda x: gather(x, *indices), x)
        return routed, *vjp(drows)

    reference = functools.partial(gather_rows, implementation="reference")
    assert helpers.same_bits(run(rows), run(reference))


@pytest.mark.gpu
def test_no_rows():
    """Arrays without a row give zeros."""
    empty, none = jnp.zeros((0, 64), jnp.bfloat16), jnp.zeros(0, jnp.int32)
    assert not np.any(sums(empty, none, 5)) and sums(empty, none, 5).shape == (5, 64)
    assert rows(empty, jnp.zeros(3, jnp.int32), jnp.zeros((0, 2), jnp.int32)).shape == (3, 64)
    weights, sizes = jnp.ones((2, 64, 32), jnp.bfloat16), jnp.zeros(2, jnp.int32)
    dout = jnp.zeros((0, 32), jnp.bfloat16)
    _, _, drhs = product_and_gradients(empty, weights, sizes, dout)
    assert drhs.shape == (2, 64, 32) and not np.any(drhs)
