"""Every operator inside shard_map with its types checked: value and gradients of a sharded batch
equal those of the whole, summed over the devices for what all of them share.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    absorb_query,
    add_norm,
    expand_values,
    flash_mla,
    gather_combine,
    gather_rows,
    gather_sum,
    grouped_gemm,
    mla_decode,
    rms_norm,
    scatter_add,
    skinny_experts,
    skinny_gemm,
    skinny_swiglu,
)
from pallas_kernels.add_norm import Rows
from pallas_kernels.flash_mla import reference as flash_reference
from tests.kernels import helpers

DEVICES = 2


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape))


def integers(high, *shape):
    return jnp.asarray(np.random.default_rng(high).integers(0, high, shape), jnp.int32)


def routing(tokens, selected):
    """Slots of `tokens` tokens in a permutation of their rows, and the token of every row."""
    slots = np.random.default_rng(1).permutation(tokens * selected).reshape(tokens, selected)
    return jnp.asarray(slots, jnp.int32), jnp.asarray(np.argsort(slots.ravel()) // selected)


# Name -> (function of shared and of sharded floating arrays, shared, sharded). The function sees
# one device's part; sharded arrays have the devices as their first dimension.
SLOTS, TOKEN_OF_ROW = routing(11, 3)
SIZES = jnp.asarray([13, 0, 70, 5], jnp.int32)
OPERATORS = {
    "grouped_gemm": (
        lambda rhs, lhs: grouped_gemm(lhs, rhs, SIZES),
        draw(4, 6, 10),
        draw(DEVICES, 90, 6),
    ),
    "gather_combine": (
        lambda weights, values: gather_combine(values, SLOTS, weights),
        draw(11, 3),
        draw(DEVICES, 33, 5),
    ),
    "gather_rows": (
        lambda scale, x: scale * gather_rows(x, TOKEN_OF_ROW, SLOTS),
        draw(33, 5),
        draw(DEVICES, 11, 5),
    ),
    "gather_sum": (
        lambda scale, values: scale * gather_sum(values, TOKEN_OF_ROW, SLOTS),
        draw(11, 5),
        draw(DEVICES, 33, 5),
    ),
    "scatter_add": (
        lambda values, scale: scale * scatter_add(values, integers(7, 20), 7),
        draw(20, 5),
        draw(DEVICES, 7, 5),
    ),
    "flash_mla": (
        lambda k, q: flash_mla(q, k, k[..., :3], scale=0.3),
        draw(2, 19, 3, 4),
        draw(DEVICES, 2, 19, 3, 4),
    ),
    "mla_decode": (
        lambda cache, q: mla_decode(q, cache, integers(9, 2), scale=0.3, value_dim=5),
        draw(2, 9, 8),
        draw(DEVICES, 2, 1, 3, 8),
    ),
    "rms_norm": (
        lambda weight, x: sum(rms_norm(x, weight, 1e-5)),
        draw(6),
        draw(DEVICES, 5, 6),
    ),
    "add_norm": (
        lambda w, x: sum(add_norm(Rows(w, x), eps=1e-5)[0]),
        draw(6),
        draw(DEVICES, 5, 6),
    ),
    "skinny_gemm": (lambda w, x: skinny_gemm(x, w)[0], draw(6, 10), draw(DEVICES, 5, 6)),
    "skinny_swiglu": (lambda w, x: skinny_swiglu(x, w, w), draw(6, 10), draw(DEVICES, 5, 6)),
    "skinny_experts": (
        lambda w, x: skinny_experts(x, draw(5, 2), integers(4, 5, 2), w, w[:, :3, :6]),
        draw(4, 6, 6),
        draw(DEVICES, 5, 6),
    ),
    "absorb_query": (
        lambda w, x: absorb_query(x[None], w, draw(5, 2), draw(5, 2)),
        draw(6, 2, 5),
        draw(DEVICES, 5, 2 * 7),
    ),
    "expand_values": (
        lambda w, x: expand_values(x, w, value_dim=3),
        draw(6, 2, 5),
        draw(DEVICES, 4, 2, 6),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_add_over_devices(name, monkeypatch):
    monkeypatch.setattr(flash_reference, "WHOLE_UP_TO", 8)
    monkeypatch.setattr(flash_reference, "CHUNK", 8)
    run, shared, sharded = OPERATORS[name]
    mesh = jax.make_mesh(
        (DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )

    def loss(shared, part):
        return jnp.sum(run(shared, part[0]) ** 2)

    def gradients(shared, part):
        return jax.grad(loss, (0, 1))(shared, part)

    split = jax.shard_map(
        gradients, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P("data"))
    )
    got = jax.jit(split)(shared, sharded)
    each = [jax.grad(loss, (0, 1))(shared, sharded[d : d + 1]) for d in range(DEVICES)]
    expected = sum(g[0] for g in each), jnp.concatenate([g[1] for g in each])
    for a, b in zip(got, expected, strict=True):
        assert np.any(b)
        assert helpers.relative_error(a, b) <= 1e-5
