"""`longcat plan`: what it prints, and one line for what it can't plan."""

import json
from pathlib import Path

import pytest

from longcat_jax.cli import main as cli
from longcat_jax.cli.plan import load_job

FLASH = "--config=configs/flash_560b.py"


def _plan(*arguments: str) -> int:
    return cli.main(["plan", *arguments])


def test_the_released_model_and_a_proposed_mesh(capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(FLASH, "--devices=1024", "--hardware=h200") == 0
    out = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line.strip())
    expected = {
        "parameters": "560.66 B",
        "MTP head, its embedding included": "1.198 B",
        "active per token with 0 real experts": "18.69 B",
        "active per token with 8 real experts": "27.15 B",
        "active per token with 12 real experts": "31.38 B",
        "training work per token at length 8192": "191.08 GFLOP",
        "tokens per step": "33.6 M",
        "work of the whole run": "3.21e+24 FLOP",
        "devices in the mesh": "1024",
        "stored parameters": "561.863 B",
    }
    assert {name: rows[name].strip() for name in expected} == expected
    (proposed,) = (line for line in out.splitlines() if line.startswith("proposed: mesh."))
    assert " train.accumulate=" in proposed and " parallel.expert_backend=allgather" in proposed
    for title in (
        "parameters, billions",
        "memory of a device; fits into 105.8 GB of h200",
        "what a device receives in a step",
        "exchange with the experts in a step",
        "traffic against the work that hides it",
        "predicted step on h200",
        "decoding on 1024 h200 at context 8192",
    ):
        assert f"\n{title}" in out, title
    assert out.isascii()


def test_the_configuration_s_own_mesh_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--config.mesh.fsdp=16", "--config.mesh.expert=32"]
    assert _plan(FLASH, "--devices=512", *own) == 0
    own_mesh = capsys.readouterr().out
    assert "proposed" not in own_mesh and "fsdp x expert" in own_mesh
    assert _plan("--config=configs/quickstart.py") == 0
    single = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in single.splitlines()]
    assert "devices in the mesh 1" in lines and "parameters 2.61 M" in lines
    assert "MTP head, its embedding included 490.800 K" in lines
    assert "\nparameters, millions\n" in single
    assert "what a device receives" not in single and "decoding on 1 h100" in single


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices=1000"], "--devices=1000: no mesh divides this job (train.global_batch"),
        (["--devices=8"], "--devices=8: no mesh fits into 60.0 GB of h100; the least is "),
        (["--devices=0"], "--devices=0: must be from 1 to 32768"),
        (["--hardware=b200"], "--hardware=b200: must be one of h100, h800, h200, a100"),
        (
            ["--config.mesh.expert=8", "--config.parallel.expert_backend=dense"],
            "parallel.expert_backend='dense': must be auto, allgather or all_to_all",
        ),
        (["--config.mesh.fsdp=1024"], "model.q_lora_rank=1536: must be divisible by mesh.fsdp"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _plan(FLASH, *arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"longcat plan: {message}")


def test_a_folder_of_huggingface_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = Path("tests/golden/tiny")
    config = load_job(str(golden), ["train.global_batch=64"])
    raw = json.loads((golden / "config.json").read_text())
    assert config.model.hidden_size == raw["hidden_size"]
    assert config.train.global_batch == 64
    assert config.train.sequence_length == min(8192, config.model.max_position_embeddings)
    assert _plan(f"--config={golden}") == 0
    assert "predicted step on h100" in capsys.readouterr().out
    (tmp_path / "config.json").write_text("{}")
    assert _plan(f"--config={tmp_path}") == 1
    assert capsys.readouterr().err.startswith("longcat plan: config.json: ")
