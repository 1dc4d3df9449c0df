"""Decoding by the memory's rate: bytes by hand, and the limits of the formula."""

import dataclasses

import pytest

from longcat_jax.plan import hardware
from longcat_jax.plan.decoding import cache_bytes, decoding, least_devices, room, shards
from tests.helpers import tiny_config
from tests.plan.test_memory import released

H100 = hardware.find("h100")
MODEL = released().model


def test_the_released_model_s_cache_and_weights():
    assert cache_bytes(MODEL) == 64_512
    # 560.66 B parameters in bfloat16 over 32 devices, the dense ones on each; no MTP head.
    one = decoding(MODEL, 32, 8192, dataclasses.replace(H100, memory=1e12))[0]
    dense = 2 * (18.69e9 + 28 * 6144 * 768)  # the router in float32
    touched = 16 * (1 - (1 - 8 / 512) ** 32) * 28 * 3 * 6144 * 2048 * 2
    expected = (dense + touched + 8192 * 64_512) / 3.35e12
    assert one.batch == 1 and one.seconds == pytest.approx(expected, rel=1e-3)
    assert one.dollars == pytest.approx(2 / 3600 * expected * 1e6, rel=1e-3)
    assert one.tokens_per_second == 1 / one.seconds


def test_a_tiny_model_by_hand():
    model = tiny_config(model={"dtype": "bfloat16"}).model
    (first, *_), cache = decoding(model, 1, 12, H100), 2 * 2 * 26 * 2
    attention = 24 * 28 + 28 * 3 * 11 + 24 * 26 + 20 * 3 * 12 + 3 * 7 * 24
    dense = 2 * (2 * 2 * (attention + 3 * 24 * 18) + 24 * 44) + 2 * 4 * 24 * 17
    experts = 8 * (1 - (1 - 2.5 / 8)) * 2 * 3 * 24 * 10 * 2
    assert cache_bytes(model) == cache
    assert first.seconds == pytest.approx((dense + experts + 12 * cache) / 3.35e12)


def test_more_sequences_are_slower_for_each_and_cheaper_for_all():
    found = decoding(MODEL, 128, 5000, H100)
    assert [one.batch for one in found][:3] == [1, 8, 32]
    assert found[-1].batch == room(MODEL, 128, 5000, H100)
    for before, after in zip(found, found[1:], strict=False):
        assert after.tokens_per_second < before.tokens_per_second
        assert after.dollars < before.dollars


def test_the_fewest_devices_that_have_room():
    fewest = least_devices(MODEL, 8192, H100)
    assert room(MODEL, fewest, 8192, H100) >= 1 > room(MODEL, fewest // 2, 8192, H100)
    assert decoding(MODEL, 8, 8192, H100) == []
    assert least_devices(tiny_config().model, 12, H100) == 1
    assert shards(MODEL, 1024) == 512 and shards(MODEL, 96) == 32
