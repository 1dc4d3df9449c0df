"""The released model's step for a cluster, compiled on this machine."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_released_model_s_step_compiles_for_1024_devices_as_planned() -> None:
    """In a process of its own, which has that many fake devices."""
    run = [sys.executable, "-m", "tests.plan.many_devices", "1024"]
    result = subprocess.run(run, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Involuntary full rematerialization" not in result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    print(found)
    assert found["seconds"] < 300
    assert found["arguments"] == found["planned_arguments"]
    assert found["planned_arguments"] + found["planned_temporaries"] < 60e9
    # XLA for CPUs computes and sends in float32 what is planned in bfloat16.
    assert found["temporaries"] < 2 * found["planned_temporaries"]
    planned, rest = found["planned_traffic"], found["traffic"]
    for name, payload in planned.items():
        kind, axes = name.split(" ", 1)
        actual = rest.pop(name)
        whole = f"all-reduce {axes}"
        if kind == "reduce-scatter" and whole not in planned:
            actual += rest.pop(whole, 0)
        assert 0.99 * payload < actual < 2.01 * payload, name
    assert sum(rest.values()) < 1e-3 * sum(planned.values()), "traffic that nobody planned"
