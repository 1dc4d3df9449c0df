"""The house rules, read off the syntax trees: who may import whom, sizes, docstrings, plain text.

A checker takes a module's name and source and returns the rules it breaks, so that each can be
shown to fail on a made-up source. The tables are the only place to edit when a module or a
dependency is added.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("longcat_jax", "pallas_kernels")
FOLDERS = (*PACKAGES, "configs", "experiments", "tests")

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
MAX_KERNEL_LINES = 150
MAX_PARAMETERS = 8

# A module imports modules of lower floors. A name that ends in a dot is a folder, whose files may
# import one another.
FLOORS: dict[str, float] = {
    "pallas_kernels.": 0,
    "longcat_jax.dataclass_mapping": 0.9,
    "longcat_jax.config": 1,
    "longcat_jax.parameters": 1.1,
    "longcat_jax.sharding": 1.2,
    "longcat_jax.parallel.pipeline.schedule": 1.1,
    "longcat_jax.model": 2,
    "longcat_jax.model.dense": 2,
    "longcat_jax.model.norm": 2,
    "longcat_jax.model.remat": 1.9,
    "longcat_jax.model.rope": 2,
    "longcat_jax.model.ffn": 2.1,
    "longcat_jax.model.embed": 2,
    "longcat_jax.model.experts": 2.1,
    "longcat_jax.parallel": 2,
    "longcat_jax.parallel.expert": 2.2,
    "longcat_jax.parallel.context": 2.1,
    "longcat_jax.model.mla": 2.2,
    "longcat_jax.model.router": 2.2,
    "longcat_jax.model.moe": 2.3,
    "longcat_jax.model.block": 2.4,
    "longcat_jax.model.mtp": 2.5,
    "longcat_jax.model.longcat": 2.6,
    "longcat_jax.model.count": 2.7,
    "longcat_jax.losses": 3,
    "longcat_jax.growth": 3,
    "longcat_jax.checkpoint": 3,
    "longcat_jax.metrics": 3,
    "longcat_jax.optim.": 3,
    "longcat_jax.data.": 3,
    "longcat_jax.numerics.": 3,
    "longcat_jax.parallel.compiler": 3,
    "longcat_jax.parallel.hlo": 3,
    "longcat_jax.parallel.multihost": 3,
    "longcat_jax.parallel.last_words": 3,
    "longcat_jax.report.": 3.1,
    "longcat_jax.hf.": 3.1,
    "longcat_jax.availability": 3.05,
    "longcat_jax.baselines": 3.05,
    "longcat_jax.workdir": 3.1,
    "longcat_jax.parallel.pipeline.split_vjp": 4,
    "longcat_jax.parallel.pipeline.executor": 4,
    "longcat_jax.inference.": 4,
    "longcat_jax.train_step": 4.1,
    "longcat_jax.evaluate": 4.2,
    "longcat_jax.plan.": 4.3,
    "longcat_jax.start": 4.5,
    "longcat_jax.train": 5,
    "longcat_jax": 5.1,
    "longcat_jax.cli.": 6,
    "longcat_jax.__main__": 6.1,
}

# Third-party package -> the modules that may import it.
THIRD_PARTY: dict[str, tuple[str, ...]] = {
    "jax": ("longcat_jax.", "pallas_kernels."),
    "numpy": ("longcat_jax.", "pallas_kernels."),
    "jax_triton": ("pallas_kernels.",),
    "triton": ("pallas_kernels.",),
    "chex": (
        "longcat_jax.model.",
        "longcat_jax.parallel.",
        "longcat_jax.losses",
        "longcat_jax.optim.",
        "longcat_jax.inference.",
        "longcat_jax.train_step",
    ),
    "flax": (
        "longcat_jax.model.",
        "longcat_jax.parameters",
        "longcat_jax.sharding",
        "longcat_jax.parallel.",
        "longcat_jax.losses",
        "longcat_jax.inference.",
        "longcat_jax.train_step",
    ),
    "optax": ("longcat_jax.optim.", "longcat_jax.train_step"),
    "orbax": ("longcat_jax.checkpoint", "longcat_jax.hf."),
    "tensorstore": ("longcat_jax.checkpoint", "longcat_jax.hf."),
    "safetensors": ("longcat_jax.hf.",),
    "ml_dtypes": ("longcat_jax.hf.", "longcat_jax.numerics."),
    "grain": ("longcat_jax.data.",),
    "array_record": ("longcat_jax.data.",),
    "tokenizers": ("longcat_jax.data.",),
    "zstandard": ("longcat_jax.data.",),
    "tqdm": ("longcat_jax.data.", "longcat_jax.hf.", "longcat_jax.cli."),
    "tensorboardX": ("longcat_jax.metrics",),
    "matplotlib": ("longcat_jax.report.",),
    "ml_collections": ("configs.",),
}
# Imported inside functions only (as <op>/triton.py itself is): the package works without them.
LAZY = ("jax_triton", "triton")

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MARKERS = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
MACHINE_PATH = re.compile(r"""(?<![\w.:/>}~-])/(home|root|work|tmp|Users|scratch)/""")


def lookup(module: str, names: Mapping[str, float] | tuple[str, ...]) -> str | None:
    """The entry that covers `module`: its own name, or the longest folder above it."""
    folders = [name for name in names if name.endswith(".") and f"{module}.".startswith(name)]
    return module if module in names else max(folders, key=len, default=None)


def imports(tree: ast.Module, *, modules: frozenset[str]) -> Iterator[tuple[str, int, bool]]:
    """Yields (imported module, line, whether at import time) of every import statement."""
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, FUNCTIONS)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            paths = [f"{base}.{alias.name}" for alias in node.names]
            names = [path if path in modules else base for path in paths]
        else:
            continue
        for name in dict.fromkeys(names):
            yield name, node.lineno, id(node) not in inner


def check_imports(module: str, source: str, *, modules: frozenset[str] = frozenset()) -> list[str]:
    """Floors and third-party packages."""
    found = []
    own = lookup(module, FLOORS)
    if own is None and module.split(".")[0] in PACKAGES:
        return [f"{module}: not placed; add it to FLOORS in tests/test_architecture.py"]
    for name, line, at_import in imports(ast.parse(source), modules=modules):
        where, top = f"{module}:{line}", name.split(".")[0]
        if name.startswith("."):
            found.append(f"{where}: relative import of {name}; write it absolutely")
        elif top in PACKAGES and own is not None:
            other = lookup(name, FLOORS)
            if other is None:
                found.append(f"{where}: imports {name}, which FLOORS doesn't place")
            elif other != own and FLOORS[other] >= FLOORS[own]:
                floors = f"floor {FLOORS[own]:g} imports floor {FLOORS[other]:g}"
                found.append(f"{where}: imports {name}: {floors}; imports only go down")
        elif top in FOLDERS:
            found.append(f"{where}: imports {name}, which stands outside of the packages")
        elif top not in sys.stdlib_module_names:
            allowed = THIRD_PARTY.get(top)
            if allowed is None:
                found.append(f"{where}: imports {top}, which THIRD_PARTY doesn't list")
            elif lookup(module, allowed) is None:
                found.append(f"{where}: imports {top}; only {', '.join(allowed)} may")
            elif top in LAZY and at_import and not module.endswith(".triton"):
                found.append(f"{where}: imports {top} at import time; do it inside a function")
    return found


def check_cycles(graph: Mapping[str, set[str]]) -> list[str]:
    """Import cycles, which one folder's files could still form."""
    found, done = [], set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" -> ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return found


def check_sizes(module: str, source: str) -> list[str]:
    """Lines of the file, lines (nested functions counted in) and parameters of its functions."""
    found = []
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        found.append(f"{module}: {lines} lines; at most {MAX_FILE_LINES}")
    leaf = module.rpartition(".")[2]
    kernels = module.startswith("pallas_kernels.") and leaf.startswith(("mosaic", "triton"))
    limit = MAX_KERNEL_LINES if kernels else MAX_FUNCTION_LINES
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, FUNCTIONS):
            continue
        where = f"{module}:{node.lineno} {node.name}"
        length = node.end_lineno - node.lineno + 1
        if length > limit:
            found.append(f"{where}: {length} lines; at most {limit}")
        count = len(parameters(node))
        # Triton and Mosaic hand a kernel one reference per operand.
        if count > MAX_PARAMETERS and not (kernels and node.name.endswith("kernel")):
            found.append(f"{where}: {count} parameters; at most {MAX_PARAMETERS}")
    return found


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """All parameters but self and cls."""
    arguments = node.args
    extra = [arg for arg in (arguments.vararg, arguments.kwarg) if arg is not None]
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [arg for arg in (*named, *extra) if arg.arg not in ("self", "cls")]


def declared(tree: ast.Module) -> Iterator[tuple[ast.AST, bool]]:
    """Yields (function or class, public) of module level and of classes, not of functions."""

    def visit(body: list[ast.stmt], public: bool) -> Iterator[tuple[ast.AST, bool]]:
        for node in body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                shown = public and not node.name.startswith("_")
                yield node, shown
                if isinstance(node, ast.ClassDef):
                    yield from visit(node.body, shown)

    return visit(tree.body, True)


def check_documented(module: str, source: str) -> list[str]:
    """Docstrings of what is public; annotations, in pallas_kernels of public functions only."""
    tree = ast.parse(source)
    found = []
    if source.strip() and not ast.get_docstring(tree):
        found.append(f"{module}: no module docstring")
    for node, public in declared(tree):
        where = f"{module}:{node.lineno} {node.name}"
        if public and not ast.get_docstring(node):
            found.append(f"{where}: no docstring")
        if isinstance(node, ast.ClassDef) or not (public or module.startswith("longcat_jax")):
            continue
        bare = [arg.arg for arg in parameters(node) if arg.annotation is None]
        if bare:
            found.append(f"{where}: no annotation of {', '.join(bare)}")
        if node.returns is None:
            found.append(f"{where}: no annotation of what it returns")
    return found


def check_text(name: str, text: str) -> list[str]:
    """ASCII, nothing left for later, no path of somebody's machine."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.isascii():
            found.append(f"{name}:{number}: not ASCII")
        if MARKERS.search(line):
            found.append(f"{name}:{number}: unfinished work is an issue, not a comment")
        if MACHINE_PATH.search(line):
            found.append(f"{name}:{number}: path of one machine")
    return found


def check_readme(readme: str, entries: list[str]) -> list[str]:
    """The file tree, a fenced block, names every entry."""
    blocks = "\n".join(readme.split("```")[1::2])
    missing = [e for e in entries if not re.search(rf"(?<![\w.]){re.escape(e)}(?!\w)", blocks)]
    return [f"README.md: its file tree doesn't name {entry}" for entry in missing]


def sources(*folders: str) -> dict[str, str]:
    """Module name -> source of every Python file."""
    found = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


def report(found: list[str]) -> None:
    """Fail with a rule a line."""
    if found:
        pytest.fail("\n".join(found), pytrace=False)


# ---- the repository keeps the rules


def test_imports_go_down() -> None:
    modules = sources(*PACKAGES, "configs")
    names = frozenset(modules)
    report([line for m, s in modules.items() for line in check_imports(m, s, modules=names)])
    graph = {
        module: {name for name, _, _ in imports(ast.parse(source), modules=names)} & names
        for module, source in modules.items()
    }
    assert sum(map(len, graph.values())) > 0
    report(check_cycles(graph))


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for folder in PACKAGES for path in (ROOT / folder).rglob("*.py")}
    bare = sorted(f for f in folders if not (f / "__init__.py").exists())
    report([f"{f.relative_to(ROOT)}: no __init__.py; an install would leave it out" for f in bare])


def test_sizes() -> None:
    report([line for m, s in sources(*FOLDERS).items() for line in check_sizes(m, s)])


def test_documented() -> None:
    modules = sources(*PACKAGES, "configs")
    report([line for m, s in modules.items() for line in check_documented(m, s)])


def test_plain_text() -> None:
    named = ("*.py", "*.md", "*.toml", "*.ini", "*.yaml", "*.yml", "*.sh", "*.ipynb")
    inside = (*FOLDERS, "docs", ".github", ".ci")
    paths = {path for folder in inside for kind in named for path in (ROOT / folder).rglob(kind)}
    paths |= {path for kind in (*named, "Makefile", ".*") for path in ROOT.glob(kind)}
    files = sorted(path for path in (*paths, ROOT / ".ci" / "run") if path.is_file())
    assert ROOT / "setup.py" in files
    found = []
    for path in files:
        if ".ipynb_checkpoints" not in path.parts:
            text = path.read_text(encoding="utf-8")
            found += check_text(str(path.relative_to(ROOT)), text)
    report(found)


def test_readme_names_every_module() -> None:
    entries = []
    for folder in PACKAGES:
        for path in sorted((ROOT / folder).iterdir()):
            if path.suffix == ".py" and not path.stem.startswith("_"):
                entries.append(path.name)
            elif path.is_dir() and any(path.rglob("*.py")):
                entries.append(f"{path.name}/")
    entries += [f"{f}/" for f in (*FOLDERS, "docs") if (ROOT / f).is_dir()]
    assert "config.py" in entries and "cli/" in entries
    report(check_readme((ROOT / "README.md").read_text(encoding="utf-8"), entries))


# ---- each rule can fail


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("longcat_jax.model.mla", "from longcat_jax.model import moe", "floor 2.2 imports floor 2"),
        ("longcat_jax.losses", "import longcat_jax.data.packing", "floor 3 imports floor 3"),
        ("pallas_kernels.flash_mla", "from longcat_jax.config import Config", "floor 0 imports"),
        ("longcat_jax.train", "def f():\n  import longcat_jax.cli.main", "floor 5 imports floor 6"),
        ("longcat_jax.novelty", "", "not placed"),
        ("longcat_jax.train", "import longcat_jax.novelty", "FLOORS doesn't place"),
        ("longcat_jax.train", "from .train_step import step", "relative import"),
        ("longcat_jax.train", "import tests.helpers", "outside of the packages"),
        ("longcat_jax.train", "import torch", "THIRD_PARTY doesn't list"),
        ("longcat_jax.losses", "import optax", "only longcat_jax.optim."),
        ("configs.tiny", "import jax", "only longcat_jax., pallas_kernels. may"),
        ("configs.tiny", "from longcat_jax import config", "outside"),
        ("pallas_kernels.flash_mla", "import flax.linen", "only longcat_jax.model."),
        ("pallas_kernels.scatter_add", "import jax_triton", "inside a function"),
    ],
)
def test_a_bad_import_is_found(module: str, source: str, message: str) -> None:
    names = frozenset({"longcat_jax.model.moe", "longcat_jax.config"})
    (found,) = check_imports(module, source, modules=names)
    assert message in found or (module.startswith("configs") and "config" in found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longcat_jax.model.moe", "from longcat_jax.model.router import route\nimport jax"),
        ("longcat_jax.optim.chain", "import optax, os\nfrom longcat_jax.optim import pid_bias"),
        ("pallas_kernels.scatter_add", "def f():\n  import jax_triton"),
        ("pallas_kernels.scatter_add.triton", "import jax_triton"),
        ("configs.tiny", "from ml_collections import ConfigDict"),
    ],
)
def test_a_good_import_passes(module: str, source: str) -> None:
    assert check_imports(module, source) == []


def test_a_cycle_is_found() -> None:
    assert check_cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c -> b"]
    assert check_cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_sizes_are_found() -> None:
    def function(lines: int) -> str:
        return "def kernel():\n" + "    pass\n" * (lines - 1)

    assert check_sizes("m", "x = 1\n" * 600) == []
    assert "601 lines" in check_sizes("m", "x = 1\n" * 601)[0]
    assert check_sizes("longcat_jax.train", function(100)) == []
    assert "101 lines" in check_sizes("longcat_jax.train", function(101))[0]
    assert check_sizes("pallas_kernels.flash_mla.mosaic_backward", function(150)) == []
    assert "151 lines" in check_sizes("pallas_kernels.flash_mla.mosaic", function(151))[0]
    nested = "def f():\n" + "".join(f"    {line}\n" for line in function(100).splitlines())
    assert "f: 101 lines" in check_sizes("longcat_jax.train", nested)[0]


def test_too_many_parameters_are_found() -> None:
    assert check_sizes("m", "class C:\n def f(self, a, b, c, d, *, e, f, g, h): ...") == []
    assert "9 parameters" in check_sizes("m", "def f(a, b, /, c, d, *e, f, g, h, **i): ...")[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "no module docstring"),
        ('"""M."""\ndef f() -> None: ...', "f: no docstring"),
        ('"""M."""\nclass C:\n  pass', "C: no docstring"),
        ('"""M."""\nclass C:\n  """C."""\n  def f(self) -> None: ...', "f: no docstring"),
        ('"""M."""\ndef f(a: int, *, b) -> None:\n  """F."""', "no annotation of b"),
        ('"""M."""\ndef _f(a: int): ...', "no annotation of what it returns"),
    ],
)
def test_missing_documentation_is_found(source: str, message: str) -> None:
    (found,) = check_documented("longcat_jax.m", source)
    assert message in found


def test_private_kernels_need_no_annotations() -> None:
    source = (
        '"""M."""\ndef _body(x_ref, y_ref): ...\ndef f(x: int) -> int:\n  """F."""\n  def g(y): ...'
    )
    assert check_documented("pallas_kernels.m", source) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caf\u00e9", "not ASCII"),
        ("# TO" + "DO: later", "unfinished"),
        ("open('/ho" + "me/me/file')", "path of one machine"),
        ("cd /wo" + "rk/main", "path of one machine"),
    ],
)
def test_bad_text_is_found(text: str, message: str) -> None:
    (found,) = check_text("m.py", f"fine\n{text}\n")
    assert message in found and ":2:" in found
    assert check_text("m.py", "a/home/b https://example.org/work/x ./tmp/y experts//tmp") == []


def test_a_readme_without_a_module_is_found() -> None:
    readme = "train.py is fine\n```\nlongcat_jax/\n  config.py   settings\n```\n"
    assert check_readme(readme, ["config.py", "longcat_jax/"]) == []
    assert check_readme(readme, ["train.py"]) == ["README.md: its file tree doesn't name train.py"]
    assert check_readme(readme, ["fig.py"]) != []
