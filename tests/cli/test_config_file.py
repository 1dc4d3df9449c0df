"""Reading configurations: what a user's file can have wrong, each as one line."""

import json
from pathlib import Path

import pytest

from longcat_jax import config as config_lib
from longcat_jax.cli.config_file import load_config

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.py"


def test_python_file_with_overrides() -> None:
    config = load_config(QUICKSTART, ["model.num_layers=6", "seed=5"])
    assert (config.model.num_layers, config.seed) == (6, 5)
    assert config.model.hidden_size == load_config(str(QUICKSTART)).model.hidden_size


def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_bytes(QUICKSTART.read_bytes())
    load_config(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.py"]


def test_saved_json_reads_back(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["optim.pid.mu=0.25"])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_lib.to_mapping(config)))
    assert load_config(path) == config
    assert load_config(path, ["seed=9"]).seed == 9


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.py", "def get_config(:\n", ":1: invalid syntax"),
        ("c.py", "x = 1\n", ": has no function get_config()"),
        ("c.py", "get_config = 3\n", ": has no function get_config()"),
        ("c.py", "import os\n\ndef get_config():\n    return 1 / 0\n", ":4: ZeroDivisionError"),
        ("c.py", "import no_such_package\n", ":1: ModuleNotFoundError: No module named"),
        ("c.py", "def get_config():\n    return [1]\n", ": holds one list, not a mapping"),
        ("c.py", "def get_config():\n    return dict(modle={})\n", "did you mean 'model'?"),
        ("c.py", "\x00", "null byte"),
        ("c.json", "{\n  'a': 1}", ":2: not valid JSON"),
        ("c.json", "7", ": holds one int, not a JSON object"),
        ("c.json", "{}", ": model: missing"),
        ("c.yaml", "a: 1", ": not a configuration; name a .py file"),
    ],
)
def test_bad_file_is_one_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(config_lib.ConfigError) as caught:
        load_config(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and message in line and "\n" not in line


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no.py"):
        load_config(tmp_path / "no.py")
    folder = tmp_path / "folder.json"
    folder.mkdir()
    with pytest.raises(IsADirectoryError, match="folder"):
        load_config(folder)
    latin = tmp_path / "latin.py"
    latin.write_bytes(b"x = '\xe9'\n")
    with pytest.raises(config_lib.ConfigError, match="latin.py: not UTF-8"):
        load_config(latin)


def test_bad_override_names_its_path() -> None:
    with pytest.raises(config_lib.ConfigError, match=r"model.num_layer.*did you mean 'num_layers'"):
        load_config(QUICKSTART, ["model.num_layer=6"])
