"""The public names are lazy, and the arrows between modules go one way."""

from __future__ import annotations

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gazepatch

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub")


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import gazepatch, sys",
        "import sys; from gazepatch import GazeConfig, GazeError, ArtefactError, __version__; GazeConfig()",
        "import sys, gazepatch.registry; gazepatch.registry.adapter_for('llava')",
        "import sys; sys.argv = ['gazepatch', '--help']\n"
        "from gazepatch.cli import main\ntry: main()\nexcept SystemExit: pass",
        "import sys; sys.argv = ['gazepatch', 'convert', '--help']\n"
        "from gazepatch.cli import main\ntry: main()\nexcept SystemExit: pass",
    ],
    ids=["package", "light names", "adapter", "help", "help of a command"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    last = python(f"{code}\nprint([m for m in {HEAVY} if m in sys.modules])").splitlines()[-1]
    assert last == "[]"


def test_every_public_name_is_there() -> None:
    assert set(gazepatch.__all__) <= set(dir(gazepatch))
    for name in gazepatch.__all__:
        assert getattr(gazepatch, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        gazepatch.nonsense  # noqa: B018


def test_modules_do_not_hide_public_functions() -> None:
    # A submodule becomes an attribute of the package when it is imported, in the place of what has its name.
    modules = {module.name for module in pkgutil.iter_modules(gazepatch.__path__)}
    assert {"patch", "config"} <= modules
    assert not modules & set(gazepatch.__all__)


def test_the_bare_folder_names_stay_free() -> None:
    code = "import sys, gazepatch.cli, gazepatch.registry; gazepatch.registry.adapter_for('llava')"
    assert python(f"{code}\nprint('adapters' in sys.modules, 'cli' in sys.modules)") == "False False"


def test_python_m() -> None:
    run = subprocess.run([sys.executable, "-m", "gazepatch.cli", "--version"], capture_output=True, text=True)
    assert run.stdout.strip() == f"gazepatch, version {gazepatch.__version__}"


# ---- arrows: what a module may import of our own, and which modules must not import torch when they are imported

ADAPTERS_MAY = ("gazepatch.adapters", "gazepatch.errors", "gazepatch.layout")
CLI_MAY_AT_TOP = ("gazepatch.cli", "gazepatch.config", "gazepatch.errors", "gazepatch.training.settings")
LIGHT = ["gazepatch/__init__.py", "gazepatch/config.py", "gazepatch/context.py", "gazepatch/errors.py"]
LIGHT += ["gazepatch/files.py", "gazepatch/layers.py", "gazepatch/layout.py", "gazepatch/registry.py"]
LIGHT += ["gazepatch/training/__init__.py", "gazepatch/training/records.py", "gazepatch/training/settings.py"]
# What measures needs torch anyway.
PACKAGES = [path for name in ("artefact", "hub") for path in sorted((ROOT / "gazepatch" / name).glob("*.py"))]
LIGHT += [path.relative_to(ROOT).as_posix() for path in PACKAGES if path.stem != "fidelity"]


def imported(path: Path, everywhere: bool = True) -> set[str]:
    """Modules that a file imports, `TYPE_CHECKING` blocks aside; with `everywhere` also inside functions."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(str(node.module))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += ast.iter_child_nodes(node)
    return found


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


ADAPTER_FILES, CLI_FILES = sorted((ROOT / "adapters").rglob("*.py")), sorted((ROOT / "cli").rglob("*.py"))


@pytest.mark.parametrize("path", ADAPTER_FILES, ids=names(ADAPTER_FILES))
def test_adapters_hold_facts_only(path: Path) -> None:
    ours = {module for module in imported(path) if module.startswith("gazepatch")}
    assert {module for module in ours if not module.startswith(ADAPTERS_MAY)} == set()
    heavy = {module for module in imported(path, everywhere=False) if module.split(".")[0] in HEAVY}
    assert heavy == set(), "import it inside the function that needs it"


@pytest.mark.parametrize("path", CLI_FILES, ids=names(CLI_FILES))
def test_commands_import_when_they_are_called(path: Path) -> None:
    top = imported(path, everywhere=False)
    assert {m for m in top if m.startswith("gazepatch") and not m.startswith(CLI_MAY_AT_TOP)} == set()
    assert {m for m in top if m.split(".")[0] in (*HEAVY, "PIL")} == set()


def test_only_the_command_line_imports_the_command_line() -> None:
    files = [path for path in ROOT.glob("gazepatch/**/*.py")] + ADAPTER_FILES
    assert [str(path) for path in files if any(m.startswith("gazepatch.cli") for m in imported(path))] == []


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name: str) -> None:
    assert {m for m in imported(ROOT / name, everywhere=False) if m.split(".")[0] in HEAVY} == set()


def arrows() -> dict[str, set[str]]:
    """Our modules, and those of them that each imports, inside functions too."""
    files = [
        path for path in (ROOT / "gazepatch").rglob("*.py") if path.parent != ROOT / "gazepatch" or path.stem[0] != "_"
    ]
    ours = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name: imported(path) & ours.keys() - {name} for name, path in ours.items()}


def test_imports_point_one_way() -> None:
    """A package is what all of its modules import."""
    left = arrows()
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "each of these imports another of them"


def test_artefacts_stand_above_models_and_the_hub() -> None:
    """Whoever patches needs no artefact, and the Hub holds whatever it is."""
    left = arrows()
    artefacts = {name for name in left if name.startswith("gazepatch.artefact.")}
    below, todo = set(), [name for name in left if name.startswith("gazepatch.hub.")]
    todo += {name for module in artefacts for name in left[module]} - artefacts
    while todo:
        below.add(name := todo.pop())
        todo += left[name] - below
    assert {"gazepatch.patch", "gazepatch.hub.fetching"} <= below
    assert below & artefacts == set()


def layers() -> dict[str, int]:
    """Modules and folders of the package by the row of docs/architecture.md that names them."""
    rows = [line.split("|")[2] for line in (ROOT / "docs/architecture.md").read_text().splitlines() if "| " in line]
    found = {}
    for number, row in enumerate(rows[1:]):  # the first is the head of the table
        for name in re.findall(r"`([a-z_]+)/?`", row):
            if (ROOT / name).is_dir() or any((ROOT / "gazepatch").glob(f"{name}*")):
                found[name] = number
    return found


def test_every_module_is_in_its_layer() -> None:
    layer = layers()
    known = {path.stem for path in (ROOT / "gazepatch").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {name for name in known if name[0] != "_"} - layer.keys() == set(), "put it into docs/architecture.md"
    for name, others in arrows().items():
        own = name.split(".")[1]
        upwards = [other for other in others if layer[other.split(".")[1]] > layer[own]]
        assert upwards == [], f"{name} imports what stands above it"
