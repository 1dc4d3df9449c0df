"""Expert back-ends on a mesh: sums and gradients of one device, exact counts where room is short.

B rows, T tokens, D model, N real experts, E with identity experts, F expert width, K selections.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longcat_jax.config import MeshConfig, ParallelConfig
from longcat_jax.parallel import expert, hlo
from longcat_jax.parallel.expert import Selected, Weights, mixture
from longcat_jax.sharding import make_mesh
from tests.helpers import exact, relative_error, tiny_config

B, T, D, N, E, F, K = 16, 12, 24, 8, 17, 10, 4
MODEL = tiny_config().model
EXPERT_8 = MeshConfig(expert=8)
DATA_2_EXPERT_4 = MeshConfig(data=2, expert=4)
FSDP_2_EXPERT_2 = MeshConfig(data=2, fsdp=2, expert=2)
FSDP_4 = MeshConfig(data=2, fsdp=4)


@pytest.fixture(scope="module", autouse=True)
def _exact():
    with exact():
        yield


@pytest.fixture(scope="module")
def arrays():
    """Tokens with skewed selections, weights, and a cotangent."""
    rng = np.random.default_rng(0)
    liking = rng.normal(size=(B, T, E)) + np.linspace(1, 0, E)
    experts = np.argsort(-liking, axis=-1)[..., :K].astype(np.int32)
    tokens = Selected(rng.normal(size=(B, T, D)), rng.uniform(size=(B, T, K)), experts)
    weights = Weights(rng.normal(size=(N, D, 2 * F)), rng.normal(size=(N, F, D)))
    return tokens, weights, rng.normal(size=(B, T, D))


def _run(arrays, parallel, mesh=None):
    """Sums, number left out, and the gradients to tokens, gates and weights."""
    tokens, weights, cotangent = arrays

    @jax.jit
    def both(x, gates, weights):
        def sums(x, gates, weights):
            selected = Selected(x, gates, jnp.asarray(tokens.experts_TK))
            return mixture(selected, weights, config=MODEL, parallel=parallel)

        out, pull, left_out = jax.vjp(sums, x, gates, weights, has_aux=True)
        return out, left_out, pull(cotangent)

    if mesh is None:
        return both(tokens.x_TD, tokens.gates_TK, weights)
    with jax.set_mesh(make_mesh(mesh)):
        return jax.device_get(both(tokens.x_TD, tokens.gates_TK, weights))


@pytest.fixture(scope="module")
def one_device(arrays):
    return _run(arrays, ParallelConfig())


CASES = [
    ("allgather", DATA_2_EXPERT_4, 2),
    ("all_to_all", FSDP_2_EXPERT_2, 1),
    ("auto", FSDP_4, 1),
]
SLOW = [
    ("dense", EXPERT_8, 1),
    ("allgather", EXPERT_8, 1),
    ("allgather", FSDP_2_EXPERT_2, 3),
    ("all_to_all", EXPERT_8, 1),
    ("all_to_all", EXPERT_8, 3),
    ("all_to_all", DATA_2_EXPERT_4, 2),
    ("all_to_all", FSDP_4, 2),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("backend", "mesh", "chunks"), CASES)
def test_sums_and_gradients_are_those_of_one_device(arrays, one_device, backend, mesh, chunks):
    ample = {} if chunks > 1 else {"dropless": False, "capacity_factor": 99.0}
    parallel = ParallelConfig(expert_backend=backend, token_chunks=chunks, **ample)
    out, left_out, gradients = _run(arrays, parallel, mesh)
    wanted_out, _, wanted = one_device
    assert left_out == 0
    assert relative_error(out, wanted_out) <= 1e-12
    assert relative_error(gradients, wanted) <= 1e-12


def _kept(experts, *, backend, chunks, mesh, rows, places):
    """Which selections a capacity lets through, slot by slot.

    Args:
      experts: [B, T, K] ids.
      backend: its name.
      chunks: of a device's tokens.
      mesh: data and expert axes only.
      rows: that a device may compute for each chunk.
      places: tokens that a device may send to each device for each chunk.
    """
    per_device = experts.reshape(mesh.data, mesh.expert, chunks, -1, K)
    kept = np.zeros(per_device.shape, bool)
    for group in range(mesh.data):
        for chunk in range(chunks):
            computed = np.zeros(mesh.expert, int)
            for sender in range(mesh.expert):
                sent = [set() for _ in range(mesh.expert)]
                for token, selections in enumerate(per_device[group, sender, chunk]):
                    for k, chosen in enumerate(selections):
                        target = chosen // (N // mesh.expert)
                        if chosen >= N:
                            kept[group, sender, chunk, token, k] = True
                            continue
                        if backend == "all_to_all" and token not in sent[target]:
                            if len(sent[target]) == places:
                                continue
                            sent[target].add(token)
                        if computed[target] < rows:
                            computed[target] += 1
                            kept[group, sender, chunk, token, k] = True
    return kept.reshape(experts.shape)


@pytest.mark.parametrize(
    ("backend", "chunks", "factor"),
    [
        ("all_to_all", 1, 0.7),
        ("allgather", 2, 0.5),
        pytest.param("all_to_all", 2, 0.6, marks=pytest.mark.slow),
    ],
)
def test_what_finds_no_room_is_counted_and_left_out(arrays, backend, chunks, factor):
    tokens, weights, cotangent = arrays
    mesh, own = DATA_2_EXPERT_4, B * T // 8 // chunks
    rows = int(np.ceil(own * MODEL.moe_topk_real * factor))
    places = -(-rows // mesh.expert)
    kept = _kept(
        tokens.experts_TK, backend=backend, chunks=chunks, mesh=mesh, rows=rows, places=places
    )
    parallel = ParallelConfig(
        expert_backend=backend, token_chunks=chunks, dropless=False, capacity_factor=factor
    )
    out, left_out, gradients = _run(arrays, parallel, mesh)
    assert left_out == np.count_nonzero(~kept)
    assert left_out > 20
    rest = dataclasses.replace(tokens, gates_TK=np.where(kept, tokens.gates_TK, 0))
    wanted_out, _, wanted = _run((rest, weights, cotangent), ParallelConfig())
    assert relative_error(out, wanted_out) <= 1e-12
    assert relative_error(gradients[0], wanted[0]) <= 1e-12
    assert relative_error(gradients[1], np.where(kept, wanted[1], 0)) <= 1e-12
    assert relative_error(gradients[2], wanted[2]) <= 1e-12


def test_defaults_follow_the_size_of_the_expert_axis(monkeypatch, arrays):
    """From `LARGE` devices on: all_to_all with a capacity, else allgather that drops nothing."""
    used = []
    for name, exchange in expert.EXCHANGES.items():

        def watched(tokens, weights, capacity, *, name=name, exchange=exchange):
            used.append((name, capacity is None))
            return exchange(tokens, weights, capacity)

        monkeypatch.setitem(expert.EXCHANGES, name, watched)
    tokens, weights, _ = arrays
    with jax.set_mesh(make_mesh(EXPERT_8)):
        for large in (16, 8):
            monkeypatch.setattr(expert, "LARGE", large)
            jax.eval_shape(
                lambda t, w: mixture(t, w, config=MODEL, parallel=ParallelConfig()), tokens, weights
            )
    assert used == [("allgather", True), ("all_to_all", False)]


def test_traffic_at_capacity_factor_1_is_the_budget_s_share_of_all_slots(arrays):
    tokens, weights, _ = arrays
    parallel = ParallelConfig(expert_backend="all_to_all", dropless=False, capacity_factor=1.0)
    with jax.set_mesh(make_mesh(DATA_2_EXPERT_4)):
        run = jax.jit(lambda t, w: mixture(t, w, config=MODEL, parallel=parallel))
        program = hlo.parse(run.lower(tokens, weights).compile().as_text())
    float64, own = 8, B * T // 8
    sent = [
        one.payload
        for one in hlo.collectives(program, {"data": 2, "expert": 4})
        if one.kind == "all-to-all"
    ]
    slots = own * K * D * float64
    *_, there, back = sorted(sent)  # gates and ids are smaller
    assert there == back == slots * MODEL.moe_topk_real / K
