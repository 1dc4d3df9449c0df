"""The table of tilings, and how it is made from times."""

import runpy

import pytest

from experiments.bench import tune
from pallas_kernels.grouped_gemm.schedule import Tiling
from pallas_kernels.grouped_gemm.shapes import PRODUCTION
from pallas_kernels.grouped_gemm.tilings import TILINGS

SMALL, LARGE = PRODUCTION[2], PRODUCTION[0]


def times(noise=1.0, **changed):
    """Of all shapes and passes: 1 s, but for the named candidate (by number) in a shape."""
    measured = {}
    for shape in (SMALL, LARGE):
        measured[shape] = {}
        for name, candidates in tune.CANDIDATES.items():
            seconds = {(tiling, 0): 1.0 for tiling in candidates}
            seconds[candidates[0], 1] = noise
            measured[shape][name] = seconds
    for shape_name, (number, value) in changed.items():
        shape = {"small": SMALL, "large": LARGE}[shape_name]
        measured[shape]["forward"][tune.CANDIDATES["forward"][number], 0] = value
    return measured


def test_the_first_tiling_stays_unless_another_beats_the_noise():
    own = {(name, None): candidates[0] for name, candidates in tune.CANDIDATES.items()}
    assert tune.choose(times()) == own
    assert tune.choose(times(noise=1.05, small=(1, 0.97), large=(1, 0.97))) == own


def test_a_tiling_that_is_faster_everywhere_becomes_the_pass_own():
    table = tune.choose(times(small=(2, 0.9), large=(2, 0.8)))
    assert table["forward", None] == tune.CANDIDATES["forward"][2]
    assert len(table) == len(tune.CANDIDATES)


def test_a_shape_may_want_another_tiling():
    table = tune.choose(times(small=(1, 0.95), large=(1, 1.5)))
    assert table["forward", None] == tune.CANDIDATES["forward"][0]
    assert table["forward", tuple(SMALL)] == tune.CANDIDATES["forward"][1]
    assert ("forward", tuple(LARGE)) not in table


def test_what_is_written_is_the_table(tmp_path):
    table = TILINGS | {("forward", tuple(SMALL)): Tiling(panel=4, pair="rows")}
    tune.write(table, tmp_path / "tilings.py")
    assert runpy.run_path(str(tmp_path / "tilings.py"))["TILINGS"] == table


def test_times_of_some_shapes_replace_no_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "--shapes", "1", "--write"])
    monkeypatch.setattr(tune, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit):
        tune.main()
    assert "--write replaces the table of all shapes" in capsys.readouterr().err


@pytest.mark.parametrize("name", tune.CANDIDATES)
def test_checked_in_table_has_every_pass(name):
    assert TILINGS[name, None] in tune.CANDIDATES[name]
    assert all(pass_name in tune.CANDIDATES for pass_name, _ in TILINGS)
