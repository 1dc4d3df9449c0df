"""The report of made-up workdirs: its numbers, its files, what it says of bad ones."""

import base64
import json
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from longcat_jax import config as config_lib
from longcat_jax.availability import AvailabilityLog
from longcat_jax.cli import main as cli
from longcat_jax.cli.config_file import load_config
from longcat_jax.metrics import MetricsWriter
from longcat_jax.report import write_report
from longcat_jax.report.page import final_figures
from longcat_jax.report.plots import MISSING, draw, smooth, thin
from longcat_jax.report.run import read_run

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.py"
BASELINES = {"unigram": 4.91, "bigram": 2.2, "xz": 1.43}


def train_values(step: int, steps: int, rng: np.random.Generator) -> dict[str, float]:
    done = step / steps
    loss = 4.3 + 4 * np.exp(-12 * done) - 0.5 * done + rng.normal(0, 0.06)
    return {
        "loss": loss,
        "mtp_loss": loss + 0.6 * done + rng.normal(0, 0.05),
        "grad_norm": 0.6 + 5 * np.exp(-20 * done) + rng.exponential(0.1),
        "learning_rate": 8e-3 * min(1, step / 40) * (1 - 0.98 * done),
        "pid_mu": 0.1 - 0.07 * done,
        "bits_per_byte": loss / 1.9,
        "experts_per_token": 3 - np.exp(-15 * done) + rng.normal(0, 0.02),
        "experts_per_token_std": 0.7,
        "max_load": 1.3 + 2 * np.exp(-10 * done) + rng.exponential(0.08),
        "max_load_mean": 1.2 + 1.2 * np.exp(-10 * done) + rng.exponential(0.03),
        "tokens_per_second": 5600 + rng.normal(0, 200) - 3000 * (step % 140 == 0),
        "step_seconds": 0.18,
        "input_wait": 0.003,
    }


def write_workdir(workdir: Path, *, steps: int = 700) -> None:
    """A run as the quickstart leaves it, with numbers of the kind that it makes."""
    rng = np.random.default_rng(0)
    config = load_config(QUICKSTART, [f"train.steps={steps}"])
    model = config.model
    with MetricsWriter(workdir) as writer:
        for step in range(1, steps + 1):
            values = train_values(step, steps, rng)
            writer.write(step, values)
            if step % (steps // 5):
                continue
            layers = np.arange(1, model.num_layers + 1)
            bits = values["bits_per_byte"] - 0.1
            evaluation = {
                "eval/loss": bits * 1.9,
                "eval/bits_per_byte": bits,
                "eval/experts_per_token": 3 + rng.normal(0, 0.02),
                "router/cosine": 0.05 * layers * (1 - 0.5 * step / steps),
                "router/balance_ratio": 0.02 * layers * (1 - 0.4 * step / steps),
            }
            writer.write(step, evaluation)
            real = rng.dirichlet(np.full(model.n_routed_experts, 25.0), model.num_layers)
            same = rng.dirichlet(np.full(model.zero_expert_num, 9.0), model.num_layers)
            writer.write_expert_load(
                step,
                load_LE=np.concatenate([0.75 * real, 0.25 * same], axis=1),
                real_experts_histogram=[0.0, 0.05, 0.2, 0.45, 0.3],
            )
    (workdir / "config.json").write_text(json.dumps(config_lib.to_mapping(config)))
    (workdir / "baselines.json").write_text(json.dumps({**BASELINES, "bigram_k": 0.02}))


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "first"
    write_workdir(workdir)
    return workdir


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


def test_files_of_a_complete_run(complete: Path) -> None:
    png, page = write_report(complete)
    assert (png, page) == (complete / "report.png", complete / "report.html")
    assert png_size(png.read_bytes()) == (1500, 1650)
    text = page.read_text(encoding="ascii")
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(picture) == png.read_bytes()
    # Nothing else is fetched: no other source, link, script or style sheet.
    assert re.findall(r"(?:src|href|url|@import)\b", text.replace(picture, "")) == ["src"]
    assert "<td>model.hidden_size</td><td>96</td>" in text
    assert "<td>optim.pid.mu</td><td>0.1</td>" in text
    assert not list(complete.glob("*.partial"))


def test_final_figures(complete: Path) -> None:
    run = read_run(complete)
    figures = final_figures(run)
    _, bits = run.curve("eval/bits_per_byte")
    assert bits.shape == (5,)
    assert figures["steps"] == "700 of 700"
    assert figures["tokens in batches"] == "717k"
    assert figures["validation, last"] == f"{bits[-1]:.4f} bits per byte"
    assert figures["bigram, same text"] == f"2.2000 bits per byte (run: {bits[-1] - 2.2:+.4f})"
    experts = np.mean([row["experts_per_token"] for row in run.rows if "loss" in row][-50:])
    shown = figures["real experts per token, last 50 steps"]
    assert shown == f"{experts:.3f} (target 3, {experts / 3 - 1:+.1%})"
    assert figures["time in steps"] == "2:06"
    assert figures["share of time waiting for data"] == "0.30%"


def test_availability_is_one_of_the_figures(complete: Path, tmp_path: Path) -> None:
    assert "availability" not in final_figures(read_run(complete))
    shutil.copytree(complete, tmp_path / "run")
    AvailabilityLog(tmp_path / "run", writes=True).start(650, processes=3)
    figures = final_figures(read_run(tmp_path / "run"))
    assert figures["availability"].startswith("0 restarts, 50 steps done again (9 s), 0 saves")


def test_only_compressions_are_baselines(complete: Path) -> None:
    assert read_run(complete).baselines == BASELINES


def test_layers_stay_apart(complete: Path) -> None:
    _, cosine = read_run(complete).curve("router/cosine")
    np.testing.assert_allclose(cosine[-1], 0.025 * np.arange(1, 5))


def test_every_panel_is_drawn(complete: Path) -> None:
    run = read_run(complete)
    whole = draw(run)
    titles = [axes.get_title() for axes in whole.findobj(Axes)]
    assert len([title for title in titles if title]) == 12
    assert "Load of identity experts at step 700" in titles
    texts = [text.get_text() for text in whole.findobj(Text)]
    assert MISSING not in texts
    assert {"target K_e = 3", "bigram 2.20", "unigram 4.91 (above)", "keep below 0.1"} < set(texts)
    bars = [bar.get_height() for bar in whole.findobj(Rectangle) if bar.get_width() == 0.8]
    np.testing.assert_allclose(sorted(bars), [0, 5, 20, 30, 45])
    # 1 is as planned: real experts share 3 of 4 selections, identity experts 1 of 4.
    real, identity = (image.get_array() for image in whole.findobj(AxesImage))
    assert real.shape == identity.shape == (4, 16)
    np.testing.assert_allclose([real.mean(axis=1), identity.mean(axis=1)], np.ones((2, 4)))


def test_young_runs_say_what_is_missing(complete: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((complete / "config.json").read_bytes())
    for lines in (
        '{"step": 1, "loss": null}\n',
        '{"step": 1, "loss": 8.3, "grad_norm": 2.0, "tokens_per_second": 40.0}\n',
        '{"step": 1, "loss": 8.3}\n{"step": 1, "eval/loss": 8.1, "router/cosine": [0.1, null]}\n',
    ):
        (tmp_path / "metrics.jsonl").write_text(lines)
        run = read_run(tmp_path)
        texts = [text.get_text() for text in draw(run).findobj(Text)]
        assert MISSING in texts
        assert final_figures(run)["steps"] == "1 of 700"
    write_report(tmp_path)
    assert png_size((tmp_path / "report.png").read_bytes()) == (1500, 1650)


def test_long_curves_are_thinned_to_the_same_mean() -> None:
    x, y = np.arange(4001.0), np.arange(4001.0) ** 0.5
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) == len(thin_y) == 1334
    assert thin_x[0] == 1.0 and thin_y[0] == pytest.approx((0 + 1 + 2**0.5) / 3)
    assert (thin_x[-1], thin_y[-1]) == (3999.5, pytest.approx((3999**0.5 + 4000**0.5) / 2))


def test_running_mean_leaves_out_nan() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 6.0])
    np.testing.assert_allclose(smooth(values), [1.5, 1.5, np.nan, 5.0, 5.0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "metrics.jsonl: not there; is "),
        ("metrics.jsonl", "", "metrics.jsonl: holds no metrics yet"),
        ("metrics.jsonl", '{"step": 1}\n}\n{"step": 2}\n', "metrics.jsonl:2: not a JSON object"),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n', "'loss' holds something that isn't a numb"),
        ("config.json", None, "config.json: No such file"),
        ("config.json", "{", "config.json:1: not valid JSON"),
        ("config.json", '{"modle": 1}', "did you mean 'model'?"),
        ("baselines.json", "[1]", "baselines.json: holds one list, not a JSON object"),
        ("baselines.json", '{"xz": "a"}', "baselines.json holds something that isn't a number"),
        ("baselines.json", '{"xz": null}', "baselines.json: must hold one number for each name"),
        ("baselines.json", '{"xz": [1]}', "baselines.json: must hold one number for each name"),
        ("expert_load.jsonl", "", "expert_load.jsonl: holds no metrics yet"),
        ("expert_load.jsonl", '{"step": 1}\n', "'load' has shape ()"),
        ("expert_load.jsonl", '{"step": 1, "load": [[1], [2, 3]]}\n', "'load' holds something"),
    ],
)
def test_bad_workdir_is_one_line(
    name: str,
    content: str | None,
    message: str,
    complete: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in complete.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    assert cli.main(["report", f"--workdir={tmp_path}"]) == 1
    err = capsys.readouterr().err
    assert message in err and err.startswith("longcat report: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("report*"))


def test_command_names_its_files(complete: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--workdir", str(complete)]) == 0
    out = capsys.readouterr().out
    assert out == f"wrote {complete}/report.png\nwrote {complete}/report.html\n"
