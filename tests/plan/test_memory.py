"""Planned memory against what XLA reports, and its formulas against counts by hand."""

import dataclasses

import pytest

from longcat_jax.cli.config_file import load_config
from longcat_jax.config import override
from longcat_jax.plan.job import Job, parts
from longcat_jax.plan.memory import abstract_mesh, memory
from tests.helpers import exact
from tests.plan.compiled import GATHERED, compiled

RELEASED = ["mesh.data=2", "mesh.fsdp=16", "mesh.expert=32", "train.accumulate=4"]


def released(*overrides: str) -> Job:
    """The released model's job on a mesh."""
    return Job(override(load_config("configs/flash_560b.py"), [*RELEASED, *overrides]))


@pytest.mark.slow
def test_arguments_of_the_compiled_step_are_exactly_those_planned():
    config, step = compiled(*GATHERED)
    with exact():
        planned = memory(Job(config)).arguments
    assert step.memory_analysis().argument_size_in_bytes == planned


def test_the_released_model_on_1024_devices():
    found = memory(released())
    # What XLA reports of the step compiled for 1024 devices.
    assert found.arguments == 15_365_010_496
    assert found.optimizer == pytest.approx(2 * found.weights, rel=1e-4)
    assert 2 * found.gradients == found.weights == found.sums
    # Of routers, tables and the unembedding there are no copies.
    assert 0.99 * found.gradients < found.copies < found.gradients
    whole = released("train.accumulate=1")
    assert memory(whole).sums == 0
    assert memory(whole).kept == 4 * found.kept == 4 * 28 * 8192 * 6144 * 2
    always = found.arguments + found.sums
    assert found.total == always + found.gradients + found.kept + found.block


@pytest.mark.parametrize(
    "overrides, gigabytes",
    [
        ([], 73.81),
        (["train.remat=selective"], 67.05),
        (["train.remat=selective", "train.vocab_chunk=8192"], 65.68),
        (["train.remat=selective", "train.accumulate=2"], 59.59),
        (["train.remat=selective", "train.unroll=1"], 74.48),
        (["train.remat=full", "train.unroll=1"], 47.94),
    ],
)
def test_mini_2b_on_one_device(overrides, gigabytes):
    found = memory(Job(load_config("configs/mini_2b.py", overrides)))
    # What XLA reports of the step compiled for an H100 (plan/deviceless.py).
    assert found.arguments == 32_361_865_328
    # Worst where layers run in a loop and much is kept: a twentieth too few.
    assert found.temporaries == pytest.approx(gigabytes * 1e9 - found.arguments, rel=0.05)


def test_parts_are_all_parameters_and_cut_as_the_rules_say():
    job = released()
    assert sum(part.values for part in job.parts.values()) == 561_862_880_256
    assert sum(part.here(job.mesh) for part in job.parts.values()) * 4 == memory(job).weights
    experts = job.part("experts")
    assert experts.values == 28 * 512 * 3 * 6144 * 2048
    assert experts.here(job.mesh) == experts.values // 512
    assert job.part("MTP embedding").cut == ("fsdp", "expert")
    headless = dataclasses.replace(job.model, num_nextn_predict_layers=0)
    assert "MTP layer" not in parts(headless) and "MTP embedding" not in parts(headless)


def test_less_is_kept_where_more_is_made_again():
    found = [
        memory(released(f"train.remat={name}")) for name in ("none", "ample", "selective", "full")
    ]
    kept = [one.kept for one in found]
    assert kept[0] > 1.2 * kept[1] > 1.4 * kept[2] > 8 * kept[3]
    assert kept[0] > 1.5 * kept[2]
    assert found[0].block < found[1].block == found[2].block == found[3].block


def test_room_for_rows_follows_the_back_end():
    job = released("parallel.capacity_factor=1.5", "parallel.token_chunks=2")
    assert (job.backend, job.dropless, job.tokens) == ("all_to_all", False, 8192)
    assert job.received == job.rows == 8192 * 8 * 3 // 2
    dropless = released("parallel.dropless=True")
    assert dropless.received == 32 * 8192 and dropless.rows == 32 * 8192 * 12
    gathered = released("parallel.expert_backend=allgather", "parallel.capacity_factor=2")
    assert gathered.received == 32 * 8192 and gathered.rows == 8192 * 16
    single = Job(load_config("configs/quickstart.py"))
    assert (single.backend, single.received, single.rows) == ("one", 1024, 4096)
    assert memory(dropless).block > memory(job).block


def test_the_abstract_mesh_has_every_axis():
    mesh = abstract_mesh(released().mesh)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 16, "pipeline": 1, "context": 1, "expert": 32}
