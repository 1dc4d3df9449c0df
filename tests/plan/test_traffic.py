"""Planned traffic: loads of links by hand, and bytes against compiled programs."""

import pytest

from longcat_jax.config import MeshConfig
from longcat_jax.parallel import hlo
from longcat_jax.plan.hardware import Load, find, group, load, of_device
from longcat_jax.plan.job import Job
from longcat_jax.plan.traffic import exchanges, flows
from tests.helpers import exact
from tests.plan.compiled import EXCHANGED, GATHERED, compiled
from tests.plan.test_memory import released

# Of one chunk: hidden states, then gates and ids that travel with them.
ARRAYS = {"dispatch": 3, "combine": 1, "gradient of combine": 1, "gradient of dispatch": 2}
ARRAYS |= {"latents": 1}
MESH = MeshConfig(data=2, fsdp=16, expert=32)


def test_groups_by_node():
    assert group(MESH, ("expert",), 8) == (32, 8)
    assert group(MESH, ("fsdp",), 8) == (16, 1)
    assert group(MESH, ("fsdp", "expert"), 8) == (512, 8)
    assert group(MeshConfig(fsdp=4, expert=4), ("fsdp",), 8) == (4, 2)
    assert group(MeshConfig(fsdp=4, expert=4), ("expert",), 8) == (4, 4)


@pytest.mark.parametrize(
    ("kind", "axes", "expected"),
    [
        # 7 of 32 parts come from the own node, 24 from the three others.
        ("all-to-all", ("expert",), Load(7 * 64, 24 * 64)),
        # Three quarters of it enter the node, by eight ports.
        ("all-gather", ("expert",), Load(31 * 64 - 192, 192)),
        ("reduce-scatter", ("expert",), Load(31 * 64 - 192, 192)),
        ("all-reduce", ("expert",), Load(2 * (31 * 64 - 192), 2 * 192)),
        ("all-gather", ("fsdp",), Load(0, 15 * 128)),
        ("all-reduce", ("data",), Load(0, 2048)),
    ],
)
def test_what_a_collective_brings_over_the_links(kind, axes, expected):
    assert load(kind, 2048, MESH, axes, 8) == expected


def test_a_load_takes_as_long_as_the_slower_link():
    h100, h800 = find("h100"), find("h800")
    inside, outside = Load(450e9 * 0.67, 0), Load(450e9 * 0.67, 80e9)
    assert inside.seconds(h100) == pytest.approx(1) and outside.seconds(h100) == pytest.approx(2)
    assert inside.seconds(h800) == pytest.approx(2.25)
    with pytest.raises(ValueError, match="--hardware=b200: must be one of h100, h800, h200, a100"):
        find("b200")


def test_identity_experts_cost_no_traffic():
    """At capacity factor 1 a dispatch carries K_e of K selections."""
    job = released("parallel.capacity_factor=1.0")
    dispatch = exchanges(job)[0]
    slot = 6144 * 2 + 12 * 8  # with all of its gates and ids
    assert dispatch.payload == 8192 * 8 * slot
    assert dispatch.times == 28 * 4
    everything = released("parallel.capacity_factor=1.5")  # room for all 12
    assert exchanges(everything)[0].payload * 8 == dispatch.payload * 12
    assert exchanges(job.with_backend("allgather"))[0].payload == 32 * 8192 * slot
    assert exchanges(released("mesh.expert=1", "mesh.fsdp=512")) == []


def test_what_is_made_again_travels_again():
    names = [flow.name for flow in exchanges(released())]
    assert names.count("dispatch") == 2 and names.count("combine") == 1
    names = [flow.name for flow in exchanges(released("train.remat=none"))]
    assert names.count("dispatch") == 1


def test_keys_travel_as_latents_over_the_context_axis():
    job = released("mesh.data=1", "mesh.context=2")
    latents = [flow for flow in flows(job) if flow.name == "latents" and flow.times == 4 * 56]
    assert [flow.kind for flow in latents] == ["all-gather", "reduce-scatter", "all-gather"]
    assert all(flow.payload == 2 * 8192 * 576 * 2 for flow in latents)
    summed = {flow.axes for flow in flows(job) if flow.kind == "all-reduce"}
    assert summed == {("context",)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(GATHERED, id="gathered"),
        pytest.param((*EXCHANGED, "full"), id="exchanged"),
        pytest.param((*GATHERED, "full"), id="made again"),
    ],
)
def test_bytes_of_a_compiled_step_are_those_planned(case):
    """And so are the numbers of exchanges and of latents. Those of weights are not compared: the
    plan takes a part's weights as one collective, XLA has one for each array.
    """
    config, step = compiled(*case)
    found = hlo.collectives(hlo.parse(step.as_text()), vars(config.mesh))
    planned: dict[tuple, int] = {}
    times: dict[tuple, int] = {}
    with exact():
        for flow in flows(Job(config)):
            key = flow.kind, flow.axes
            planned[key] = planned.get(key, 0) + flow.times * flow.payload
            if number := ARRAYS.get(flow.name, 0):
                number *= 1 if flow.name == "latents" else config.parallel.token_chunks
                times[key] = times.get(key, 0) + flow.times * number
    for key, number in times.items():
        assert sum(one.times for one in found if (one.kind, one.axes) == key) == number, key
    rest = {key: payload for key, (_, payload) in hlo.totals(found).items()}
    # Left out of plans: gradients of norms and biases, metrics.
    small = 8 * sum(part.small for part in Job(config).parts.values()) + 4096
    for (kind, axes), payload in planned.items():
        actual = rest.pop((kind, axes))
        whole = "all-reduce", axes
        if kind == "reduce-scatter" and whole not in planned:
            actual += rest.pop(whole, 0)  # XLA for CPUs reduces all of some and takes a part
        extra = 0 if kind in ("all-gather", "all-to-all") else small
        assert 0.99 * payload <= actual <= payload + extra, f"{kind} over {axes}"
    assert sum(rest.values()) <= small and {kind for kind, _ in rest} <= {"all-reduce"}


def test_devices_are_known_by_the_names_that_jax_gives_them():
    assert of_device("NVIDIA H100 80GB HBM3") is find("h100")
    assert of_device("NVIDIA A100-SXM4-80GB").flops == 312e12
    assert of_device("cpu") is None and of_device("NVIDIA L4") is None
