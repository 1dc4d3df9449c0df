"""Communication is hidden and nothing stray is sent: read off the schedule that XLA makes for eight
H100.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

PRODUCTS, LINK = 700e12, 300e9  # FLOP/s of one H100, bytes/s that it receives
LARGE = 16e6  # bytes: hidden states, not their gates and ids


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="compiles for H100 without one: needs pip install 'longcat_jax[aot]'",
)
def test_dispatch_and_combine_hide_behind_products() -> None:
    """All ways there and back, forward and backward, beside products that take at least as long."""
    run = [sys.executable, "-m", "tests.parallel.deviceless"]
    result = subprocess.run(run, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Involuntary full rematerialization" not in result.stderr
    print(result.stdout)
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kernels"] > 0

    exchanges, layers, chunks = found["exchanges"], 2, 2
    # Ways there with gates and ids, way back; that there again; both gradients, one with gates.
    assert sum(one["times"] for one in exchanges) == layers * chunks * (3 + 1 + 3 + 1 + 2)
    large = [one for one in exchanges if one["payload"] > LARGE]
    assert sum(one["times"] for one in large) == layers * chunks * 5
    assert all(one["asynchronous"] for one in large)
    assert all(one["products"] / PRODUCTS >= one["received"] / LINK for one in large)
    # At capacity factor 1 a token travels K_e = 8 times of K = 12.
    slots = 8192 // chunks * 12 * 6144 * 2
    assert {one["payload"] for one in large} == {slots * 8 // 12}

    rest, planned = found["traffic"], found["planned_traffic"]
    for name, payload in planned.items():
        assert rest.pop(name) == pytest.approx(payload, rel=1e-3), name
    assert all(name.startswith("all-reduce") for name in rest)
    assert sum(rest.values()) < 1e-3 * sum(planned.values()), "traffic that nobody planned"
    assert found["arguments"] == found["planned_arguments"]
    assert 0.75 < found["temporaries"] / found["planned_temporaries"] < 1.1
