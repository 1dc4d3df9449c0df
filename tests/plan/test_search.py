"""Proposed meshes: the fastest that fits, and one clear line where there is none."""

import dataclasses

import pytest

from longcat_jax.cli.config_file import load_config
from longcat_jax.config import ConfigError, MeshConfig, override
from longcat_jax.plan import hardware, search
from longcat_jax.plan.hardware import USABLE
from longcat_jax.plan.job import Job
from longcat_jax.plan.memory import memory
from longcat_jax.plan.training import step
from tests.plan.test_memory import released

H100 = hardware.find("h100")


def test_the_released_model_on_1024_devices_stays_under_60_gigabytes():
    config = load_config("configs/flash_560b.py")
    job = search.propose(config, 1024, H100)
    assert job.mesh.num_devices == 1024
    assert memory(job).total < 60e9
    best = step(job, H100).seconds
    tried = 0
    others = MeshConfig(data=4, fsdp=8, expert=32), MeshConfig(data=2, fsdp=8, expert=64)
    for mesh in (*others, job.mesh):
        for accumulate in (1, 2, 4):
            plain = Job(search.with_mesh(config, mesh, accumulate))
            for backend in ("allgather", "all_to_all"):
                other = plain.with_backend(backend)
                tried += search.fits(other, H100)
                assert step(other, H100).seconds >= best or not search.fits(other, H100)
    assert tried >= 4


def test_the_way_to_the_experts_is_searched_unless_it_is_named():
    config = load_config("configs/flash_560b.py")
    found = search.propose(config, 1024, H100)
    assert config.parallel.expert_backend == "auto" and found.backend == "allgather"
    named = override(config, ["parallel.expert_backend=all_to_all"])
    slower = search.propose(named, 1024, H100)
    assert slower.backend == "all_to_all"
    assert step(slower, H100).seconds > step(found, H100).seconds
    with pytest.raises(ConfigError, match=r"parallel.expert_backend='dense': must be auto, all"):
        Job(override(config, ["mesh.expert=8", "parallel.expert_backend=dense"]))


def test_frozen_parameters_have_no_moments_to_make_room_for():
    job = released("mesh.data=1", "mesh.fsdp=4", "mesh.expert=32", "train.accumulate=32")
    frozen = ["optim.freeze=('layers/*',)", "optim.balance.alpha=0.0"]
    tuned = Job(override(job.config, frozen))
    assert memory(tuned).optimizer < 0.1 * memory(job).optimizer
    room = dataclasses.replace(H100, memory=memory(tuned).total / USABLE)
    assert search.fits(tuned, room) and not search.fits(job, room)


def test_bigger_memory_never_makes_the_proposal_slower():
    config = load_config("configs/flash_560b.py")
    bigger = dataclasses.replace(H100, memory=2 * H100.memory)
    small, big = (search.propose(config, 512, machine) for machine in (H100, bigger))
    assert step(big, H100).seconds <= step(small, H100).seconds


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (96, r"--devices=96: no mesh divides this job \(train.global_batch=4096: must be divis"),
        (16, r"--devices=16: no mesh fits into 60.0 GB of h100; the least is \d+.\d GB a device"),
    ],
)
def test_devices_that_do_not_do_are_refused(devices, message):
    with pytest.raises(ConfigError, match=message):
        search.propose(load_config("configs/flash_560b.py"), devices, H100)


def test_the_context_axis_is_kept():
    config = released("mesh.data=1", "mesh.context=2").config
    with pytest.raises(ConfigError, match="--devices=27: not divisible by mesh.context=2"):
        search.propose(config, 27, H100)
    assert {mesh.context for mesh in search.meshes(12, 2)} == {2}
    assert len({dataclasses.astuple(mesh) for mesh in search.meshes(12, 1)}) == 18


def test_the_largest_batch_fits_and_one_row_more_does_not():
    job = released()
    rows = search.largest_batch(job, H100)
    fits = [
        search.fits(released(f"train.global_batch={number * 1024 * 4}"), H100)
        for number in (rows, rows + 1)
    ]
    assert rows >= 2 and fits == [True, False]
    tight = dataclasses.replace(H100, memory=20e9)
    assert search.largest_batch(job, tight) == 0
