"""The predicted step: arithmetic by hand, and its answers to hardware, recomputation, overlap."""

import dataclasses

import pytest

from longcat_jax.plan import hardware
from longcat_jax.plan.job import Job
from longcat_jax.plan.traffic import BLOCK, DENSE_PATH
from longcat_jax.plan.training import Exposure, Pass, attention_weights, step
from tests.plan.test_memory import released

H100 = hardware.find("h100")
FREE = dataclasses.replace(H100, inside=1e30, outside=1e30)
"""Traffic takes no time."""


def test_attention_s_matrices_of_the_released_model():
    query, latent = 6144 * 1536 + 1536 * 64 * 192, 6144 * 576
    assert attention_weights(released().model) == query + latent + 512 * 64 * 256 + 8192 * 6144


def test_without_traffic_a_step_is_its_arithmetic():
    job = released("train.remat=none")
    found = step(job, FREE)
    assert sum(wait.seconds for wait in found.exposures) == pytest.approx(0, abs=1e-9)
    assert found.seconds == pytest.approx(found.blocks + found.loss + found.optimizer)
    tokens = 4096 * 8192
    assert found.tokens_per_second == pytest.approx(tokens / found.seconds)
    # 191 GFLOP a token; what is slower than a dense product, and what isn't counted, cost the rest.
    assert found.mfu == pytest.approx(191.08e9 * found.tokens_per_second / 1024 / 989e12, rel=1e-4)
    assert 0.4 < found.mfu < hardware.DENSE
    twice = dataclasses.replace(FREE, flops=2 * FREE.flops, memory_rate=2 * FREE.memory_rate)
    assert step(job, twice).seconds == pytest.approx(found.seconds / 2)


def test_what_is_made_again_costs_time():
    times = [step(released(f"train.remat={name}"), FREE) for name in ("none", "selective", "full")]
    none, selective, full = (one.blocks for one in times)
    assert none < selective < full
    assert full / none == pytest.approx(1.31, abs=0.02)  # a forward pass more, attention dearer


def test_rows_that_only_hold_room_move_too():
    fixed, dropless = (
        released("train.remat=none", f"parallel.dropless={one}") for one in (False, True)
    )
    more = step(dropless, FREE).blocks - step(fixed, FREE).blocks
    rows = (32 * 8192 * 12 - 8192 * 12) * 3 * (2048 + 6144)
    received = (32 * 8192 - 8192 * 12) * 2 * 6144
    # Once forward and twice backward, in 28 blocks and 4 micro-batches.
    seconds = 3 * 28 * 4 * 2 * (rows + received) / (FREE.memory_rate * hardware.MEMORY)
    assert more == pytest.approx(seconds)


def test_windows_share_a_pass_between_the_two_kinds_of_traffic():
    one = Pass(attention=2.0, ffn=3.0, experts=8.0, router=0.5, elementwise=1.0)
    assert one.total == 19.5
    assert one.windows(1) == {DENSE_PATH: 8.0, BLOCK: 10.5}
    assert one.windows(4) == {DENSE_PATH: 14.0, BLOCK: 4.5}
    assert one.plus(one).total == 39.0
    assert Exposure(BLOCK, False, traffic=3.0, window=2.0).seconds == 1.0
    assert Exposure(BLOCK, False, traffic=2.0, window=3.0).seconds == 0.0


def test_chunks_hide_more_and_slower_links_less():
    found = step(released("train.accumulate=2"), H100)
    chunked = step(released("train.accumulate=2", "parallel.token_chunks=2"), H100)
    first, second = (
        next(wait for wait in one.exposures if (wait.behind, wait.backward) == (DENSE_PATH, False))
        for one in (found, chunked)
    )
    assert first.seconds == pytest.approx(first.traffic - first.window) and first.seconds > 0
    assert second.traffic == first.traffic and second.window > first.window
    assert chunked.blocks == found.blocks and chunked.seconds < found.seconds
    single = released("mesh.data=1", "mesh.fsdp=1", "mesh.expert=8", "train.accumulate=512")
    assert step(single, hardware.find("h800")).seconds > step(single, H100).seconds


def test_one_device_has_no_traffic():
    single = released("mesh.data=1", "mesh.fsdp=1", "mesh.expert=1", "train.accumulate=4096")
    assert step(Job(single.config), H100).exposures == ()
