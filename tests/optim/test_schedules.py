"""Learning rate and PID gain at the corners of their curves."""

import numpy as np
import pytest

from longcat_jax.config import OptimConfig, PidConfig
from longcat_jax.optim.schedules import learning_rate, pid_gain

PEAK, STEPS = 0.4, 100


def _curve(steps=STEPS, **fields):
    schedule = learning_rate(OptimConfig(learning_rate=PEAK, **fields), steps)
    return np.array([schedule(step) for step in range(steps + 1)])


def test_wsd_warms_up_stays_and_decays_to_the_final_scale():
    curve = _curve(warmup_steps=10, decay_steps=20, final_scale=0.25)
    assert curve[0] == pytest.approx(PEAK / 10)
    assert (np.diff(curve[:11]) > 0).all()
    np.testing.assert_allclose(curve[10:81], PEAK, rtol=1e-6)
    np.testing.assert_allclose(np.diff(curve[80:]), -PEAK * 0.75 / 20, rtol=1e-4)
    assert curve[90] == pytest.approx(PEAK * (1 - 0.75 / 2))
    assert curve[STEPS] == pytest.approx(PEAK * 0.25)


def test_wsd_without_warm_up_and_decay_is_constant():
    np.testing.assert_allclose(_curve(), PEAK, rtol=1e-6)


def test_a_run_shorter_than_its_decay_still_warms_up_and_reaches_the_end():
    curve = _curve(30, warmup_steps=10, decay_steps=660, final_scale=0.1)
    assert curve[0] == pytest.approx(PEAK / 10)
    assert curve[10] == pytest.approx(PEAK)
    assert curve[30] == pytest.approx(PEAK * 0.1)
    shorter = _curve(5, warmup_steps=10, decay_steps=660)
    assert (np.diff(shorter[:5]) > 0).all() and shorter[4] < PEAK


def test_cosine_warms_up_and_falls_by_half_a_cosine():
    curve = _curve(schedule="cosine", warmup_steps=20, final_scale=0.25)
    assert curve[0] == pytest.approx(PEAK / 20)
    assert curve[20] == pytest.approx(PEAK)
    assert curve[60] == pytest.approx(PEAK * (0.25 + 0.75 / 2))
    assert curve[40] == pytest.approx(PEAK * (0.25 + 0.75 * (1 + np.cos(np.pi / 4)) / 2))
    assert curve[STEPS] == pytest.approx(PEAK * 0.25)


def test_pid_gain_falls_linearly_over_training():
    pid = PidConfig(mu=0.3, mu_final=0.1)
    gain = pid_gain(OptimConfig(learning_rate=1.0, pid=pid), STEPS)
    values = [float(gain(step)) for step in (0, 50, 100, 150)]
    assert values == pytest.approx([0.3, 0.2, 0.1, 0.1])
