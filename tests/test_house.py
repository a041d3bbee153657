"""The house stays as it is built: what imports what, and what is in the wheel."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders_with_code() -> set[str]:
    return {
        "gpumem_tui." + ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("engine", "tui", "profiles")
        for path in (ROOT / top).rglob("*.py")
    }


def test_the_packages_are_the_folders_on_disk() -> None:
    packages = set(PROJECT["tool"]["setuptools"]["packages"])
    assert packages == folders_with_code() | {"gpumem_tui.watch", "gpumem_tui.predict"}, (
        "and what training scripts import, a folder of the engine"
    )


def test_the_wheel_holds_every_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"gpumem_tui/{name}"
        for name in listed
        if name.split("/")[0] in ("engine", "tui", "profiles") and not name.endswith(".md")
    }
    assert wanted <= held, wanted - held
    for name in ("watch", "predict"):
        assert {f"gpumem_tui/{name}/__init__.py", f"gpumem_tui/{name}/py.typed"} <= held
    (licence,) = (name for name in held if name.endswith("LICENSE"))
    assert "Apache License" in zipfile.ZipFile(wheel).read(licence).decode()
    tops = {name.split("/")[0] for name in held if ".dist-info" not in name}
    assert tops == {"gpumem_tui"}, "nothing of ours may lie beside other people's packages"


def test_ruff_and_mypy_find_nothing(tmp_path: Path) -> None:
    """mypy wants the tree as it is installed: `gpumem_tui` with its folders in it; no test runs the benchmarks."""
    (tmp_path / "gpumem_tui").mkdir()
    for top in ("engine", "tui", "profiles"):
        (tmp_path / "gpumem_tui" / top).symlink_to(ROOT / top)
    (tmp_path / "gpumem_tui" / "watch").symlink_to(ROOT / "engine" / "watch" / "public")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", os.devnull]
    for command in (
        [BIN / "ruff", "check", "."],
        [BIN / "ruff", "format", "--check", "."],
        [BIN / "mypy", *config, "--explicit-package-bases", "-p", "gpumem_tui", "-p", "tests.benchmarks"],
    ):
        environment = os.environ | {"MYPYPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_rooms_import_downwards_only() -> None:
    done = subprocess.run([BIN / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module",
    ["engine.config", "engine.events", "engine.ledger", "engine.feed", "engine.recording", "engine.session",
     "engine.remote", "engine.service", "engine.techniques", "profiles", "tui.app"],
)  # fmt: skip
def test_what_the_app_needs_loads_no_torch(module: str) -> None:
    heavy = {"torch", "transformers", "peft", "bitsandbytes"} | (set() if module == "tui.app" else {"textual"})
    code = f"import sys, gpumem_tui.{module}; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    if module == "engine.techniques":
        code = code.replace("; loaded", "; gpumem_tui.engine.techniques.registry(); loaded")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_ci_runs_is_there() -> None:
    for name in re.findall(r"run: (\.ci/\w+)", (ROOT / ".github/workflows/ci.yml").read_text()):
        assert os.access(ROOT / name, os.X_OK), name


def test_documents_lead_to_what_is_there() -> None:
    patterns = ("README.md", ".github/*.md", "engine/*.md", "tui/*.md", "tests/**/*.md")
    for document in (path for pattern in patterns for path in ROOT.glob(pattern)):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)}: {target}"


def test_docstrings_begin_with_the_thing_they_speak_of() -> None:
    """A docstring is a text that stands alone: beneath a class or a function, a constant or an attribute."""
    asks = re.compile(r"\s*(What|Whatever|Who|Whoever|Whose|Whether|Which|Where|Why|How|Of)\b")
    found = []
    for path in (path for top in ("engine", "tui", "profiles") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Expr(value=ast.Constant(value=str(text))) if asks.match(text):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {text.strip().splitlines()[0]}")
    assert not found, "\n".join(sorted(found))


def test_only_these_things_are_at_the_top() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tops = {name.split("/")[0] for name in listed.split()}
    assert {t for t in tops if not t.startswith(".")} == {
        "engine", "profiles", "tests", "tui", "README.md", "pyproject.toml",
    }  # fmt: skip
