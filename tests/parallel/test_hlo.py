"""The reader of compiled modules, on modules written by hand and on ones compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longcat_jax.config import MeshConfig
from longcat_jax.parallel import hlo
from longcat_jax.sharding import make_mesh

MESH = {"data": 2, "fsdp": 1, "expert": 4}

# Layer loop: a dispatch behind which a fused product runs, a sync exchange, a gather in flight over
# another gather; before it a cuBLAS product, behind it a grouped product in a Mosaic kernel.
BY_HAND = """\
HloModule by_hand, is_scheduled=true, entry_computation_layout={()->bf16[]}

%product (p.0: bf16[30,50], p.1: bf16[50,70]) -> bf16[30,70] {
  %p.0 = bf16[30,50]{1,0} parameter(0)
  %p.1 = bf16[50,70]{1,0} parameter(1)
  ROOT %dot.1 = bf16[30,70]{1,0} dot(%p.0, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (p.2: (s32[], bf16[30,50], bf16[50,70])) -> (s32[], bf16[30,50], bf16[50,70]) {
  %p.2 = (s32[], bf16[30,50]{1,0}, /*index=2*/bf16[50,70]{1,0}) parameter(0)
  %x = bf16[30,50]{1,0} get-tuple-element(%p.2), index=1
  %w = bf16[50,70]{1,0} get-tuple-element(%p.2), index=2
  %all-to-all-start = ((bf16[30,50]{1,0}), bf16[30,50]{1,0}) all-to-all-start(%x), channel_id=1, \
replica_groups=mesh['data'=2,'expert'=4] {'expert'}, dimensions={0}, metadata={op_name="a/dispatch"}
  %fused = bf16[30,70]{1,0} fusion(%x, %w), kind=kCustom, calls=%product
  %all-to-all-done = bf16[30,50]{1,0} all-to-all-done(%all-to-all-start)
  %sync = bf16[30,50]{1,0} all-to-all(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %gather.1 = ((bf16[30,50]), bf16[60,50]) all-gather-start(%x), replica_groups=[4,2]<=[2,4]T(1,0)
  %gather.2 = ((bf16[30,50], f32[3]), (bf16[240,50], f32[24])) async-start(%x, %w), calls=%wrapped
  %dot.2 = bf16[30,70]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %done.2 = (bf16[240,50], f32[24]) async-done(%gather.2)
  %done.1 = bf16[60,50]{1,0} all-gather-done(%gather.1)
  ROOT %next = (s32[], bf16[30,50]{1,0}, bf16[50,70]{1,0}) tuple(%x, %all-to-all-done, %w)
}

%wrapped (p.3: bf16[30,50]) -> (bf16[240,50], f32[24]) {
  %p.3 = bf16[30,50]{1,0} parameter(0)
  ROOT %inner = (bf16[240,50], f32[24]) all-gather(%p.3), replica_groups=[1,8]<=[8], dimensions={0}
}

%condition (p.4: (s32[], bf16[30,50], bf16[50,70])) -> pred[] {
  %p.4 = (s32[], bf16[30,50]{1,0}, bf16[50,70]{1,0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (arg: bf16[30,50]) -> bf16[] {
  %arg = bf16[30,50]{1,0} parameter(0)
  %w.1 = bf16[50,70]{1,0} constant({...})
  %experts = bf16[6,50,70]{2,1,0} constant({...})
  %permuted = bf16[30,50]{1,0} collective-permute(%arg), source_target_pairs={{0,4},{4,0}}
  %reduce.1 = ((bf16[30,50]), bf16[15,50]) reduce-scatter-start(%arg), replica_groups=[2,4]<=[8], \
to_apply=%product
  %gemm = (bf16[30,70], s8[4096]) custom-call(%arg, %w.1), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %reduce.2 = bf16[15,50]{1,0} reduce-scatter-done(%reduce.1)
  %init = (s32[], bf16[30,50]{1,0}, bf16[50,70]{1,0}) tuple(%arg, %arg, %w.1)
  %while.1 = (s32[], bf16[30,50]{1,0}, bf16[50,70]{1,0}) while(%init), condition=%condition, \
body=%body, backend_config={"known_trip_count":{"n":"28"},"known_init_step":{"init":"0"}}
  %sum = f32[9]{0} all-reduce(%arg), replica_groups={}, to_apply=%product
  %grouped = bf16[30,70] custom-call(%w.1, %arg, %experts), custom_call_target="mosaic_gpu_v2"
  ROOT %out = bf16[] constant(0)
}
"""
PRODUCT = 2 * 30 * 50 * 70
X, W = 2 * 30 * 50, 2 * 50 * 70


def test_a_module_written_by_hand():
    program = hlo.parse(BY_HAND)
    assert program.scheduled and program.entry == "main"
    assert [len(lines) for lines in program.computations.values()] == [3, 13, 2, 2, 12]
    found = hlo.collectives(program, MESH, flops_per_second=PRODUCT, bytes_per_second=X)
    kinds = [
        (one.kind, one.axes, one.group_size, one.arrays, one.payload, one.times) for one in found
    ]
    assert kinds == [
        ("collective-permute", ("data",), 2, 1, X, 1),
        ("reduce-scatter", ("expert",), 4, 1, X, 1),
        ("all-reduce", ("data", "expert"), 8, 1, X, 1),
        ("all-to-all", ("expert",), 4, 1, X, 28),
        ("all-to-all", ("expert",), 4, 1, X, 28),
        ("all-gather", ("data",), 2, 1, 2 * X, 28),
        ("all-gather", ("data", "expert"), 8, 2, 8 * (X + W), 28),
    ]
    assert [one.asynchronous for one in found] == [False, True, False, True, False, True, True]
    assert [one.products / PRODUCT for one in found] == [0, 1, 0, 1, 0, 1, 1]
    # At one product a second and one x a second; the joint gather waits for the one before it.
    late = 1 + 7 * (X + W) / X - 1  # less the product
    np.testing.assert_allclose([one.exposed for one in found], [1, 0, 1.75, 0, 0.75, 0, late])
    assert found[3].op_name == "a/dispatch" and found[3].received == 0.75 * X
    sums = hlo.totals(found)
    assert sums["all-to-all", ("expert",)] == (56, 56 * X)
    assert sums["all-gather", ("data", "expert")] == (56, 28 * 8 * (X + W))
    lines = hlo.overlap_table(found).splitlines()
    assert len(lines) == 8 and "a/dispatch" in lines[4] and "all-to-all (sync)" in lines[5]


@pytest.mark.parametrize(
    ("line", "products"),
    [
        ("bf16[30,70] custom-call(%experts, %x), custom_call_target='mosaic_gpu_v2'", 1),
        ("bf16[6,50,70] custom-call(%x, %fused), custom_call_target='mosaic_gpu_v2'", 1),
        ("bf16[30,70] custom-call(%experts, %w), custom_call_target='mosaic_gpu_v2'", 0),
        ("bf16[30,70] custom-call(%x, %w), custom_call_target='SliceToDynamic'", 0),
        (
            "(bf16[5,4,3,8], f32[5,3,4]) custom-call(%q, %k), custom_call_target='mosaic_gpu', "
            "metadata={op_name='a/flash_mla_forward/b'}",
            5 * 3 * 4 * 7 * (6 + 8) / PRODUCT,
        ),
        (
            "(bf16[5,7,2,6], bf16[5,7,2,8], bf16[5,2,9,64,64]) custom-call(%q, %k), "
            "custom_call_target='mosaic_gpu', metadata={op_name='a/flash_mla_keys/b'}",
            2 * 5 * 2 * 4 * 7 * (6 + 8) / PRODUCT,
        ),
        (
            "bf16[5,4,2,6] custom-call(%k, %q), custom_call_target='mosaic_gpu', "
            "metadata={op_name='a/flash_mla_queries/b'}",
            5 * 2 * 4 * 7 * 6 / PRODUCT,
        ),
        ("bf16[] conditional(%x), branch_computations={%condition, %product}", 1),
        ("bf16[] while(%x), body=%product, backend_config={'known_trip_count':{'n':'3'}}", 3),
        ("bf16[30,70] exponential(%x)", 0),
    ],
)
def test_what_counts_as_a_product(line, products):
    experts = "  %experts = bf16[6,50,70]{2,1,0} constant({...})\n"
    heads = "  %q = bf16[5,4,3,6] constant({...})\n  %k = bf16[5,7,3,6] constant({...})\n"
    text = BY_HAND.replace("  %sync =", f"{experts}{heads}  %sync =")
    start = text.index("  %dot.2 = ")
    line = "  %other = " + line.replace("'", '"') + "\n"
    text = text[:start] + line + text[text.index("  %done.2", start) :]
    found = hlo.collectives(hlo.parse(text), MESH)[-1].products
    assert found == pytest.approx(products * PRODUCT)


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("mesh['a'=8] {'a'}", ("data", "expert"), 8),
        ("mesh['a'=8] {'a':(1)2}", ("data",), 2),
        ("mesh['a'=8] {'a':(2)4}", ("expert",), 4),
        ("mesh['a'=8] {'a':(2)2}", None, 2),
        ("mesh['a'=4,'b'=2] {'a':(1)2}", ("data",), 2),
        ("mesh['a'=4,'b'=2] {'a':(2)2,'b'}", ("expert",), 4),
        ("[1,8]<=[8]", ("data", "expert"), 8),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[4,2]<=[8]", None, 2),
        ("{{0,1,2,3},{4,5,6,7}}", ("expert",), 4),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
    ],
)
def test_replica_groups_in_every_notation(groups, axes, size):
    text = BY_HAND.replace("replica_groups=[2,4]<=[8]", f"replica_groups={groups}")
    one = hlo.collectives(hlo.parse(text), MESH)[1]
    assert (one.axes, one.group_size) == (axes, size)


def test_a_program_compiled_for_eight_devices():
    """Four steps of a scan with an exchange each, and a sum over two axes behind it."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))

    def step(x_TD, w_DD):
        y_TD = jax.lax.all_to_all(x_TD @ w_DD, "expert", 0, 0, tiled=True)
        return y_TD + jax.lax.ppermute(y_TD, "fsdp", [(0, 1), (1, 0)]), None

    def run(x_TD, w_LDD):
        x_TD, _ = jax.lax.scan(step, x_TD, w_LDD)
        total_D = jax.lax.psum(x_TD.sum(0), ("data", "expert"))
        return total_D, jax.lax.all_gather(x_TD, ("fsdp", "expert"), tiled=True)

    specs = P(("data", "fsdp", "expert"))
    out = (P("fsdp"), P("data"))
    wrapped = jax.shard_map(run, mesh=mesh, in_specs=(specs, P()), out_specs=out, check_vma=False)
    x_TD = jnp.ones((8 * 6, 10), jnp.float32)
    text = jax.jit(wrapped).lower(x_TD, jnp.ones((4, 10, 10))).compile().as_text()
    found = hlo.collectives(hlo.parse(text), mesh.shape)
    x = 4 * 6 * 10
    assert hlo.totals(found) == {
        ("all-to-all", ("expert",)): (8, 4 * x),  # a CPU exchanges the parts as arrays
        ("collective-permute", ("fsdp",)): (4, 4 * x),
        ("all-reduce", ("data", "expert")): (1, 4 * 10),
        ("all-gather", ("fsdp", "expert")): (1, 4 * x),
    }


def test_text_of_something_else_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("module @jit_f {\n}\n")
