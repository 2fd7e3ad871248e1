"""The public surface, the direction of imports, and what importing costs: checked on the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer

import lhcompile
from lhcompile.cli import app
from lhcompile.config import BuildConfig, LoadConfig

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lhcompile").rglob("*.py"))
STAGES = {path.parent.name for path in (ROOT / "lhcompile").glob("*/__init__.py")}
SHARED = {"artifacts", "config", "errors", "extremes", "measure", "ops", "parallel", "sizes", "ssm"}
"""What stages may import beside themselves."""
RUNTIME = sorted((ROOT / "runtimes/python/lhruntime").rglob("*.py"))
SCRIPTS = [path for path in sorted((ROOT / "examples").glob("*/*.py")) if "__main__" in path.read_text("utf-8")]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules, and names out of modules, that a piece of source imports: `a.b` and `a.b.name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- names ---------------------------------------------------------------------------------------------------------


def test_all_is_what_can_be_imported() -> None:
    star = "from lhcompile import *; print(*sorted(n for n in dir() if not n.startswith('__')))"
    assert python(star).split() == lhcompile.__all__ == sorted(lhcompile.__all__)
    for name in lhcompile.__all__:
        assert getattr(lhcompile, name).__doc__
        assert getattr(lhcompile, name).__name__ in (name, f"lhcompile.{name}")  # distill is a package too
        assert callable(getattr(lhcompile, name))
    with pytest.raises(AttributeError, match="module 'lhcompile' has no attribute 'nothing'"):
        _ = lhcompile.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", SOURCES + RUNTIME, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_says_what_it_offers(path: Path) -> None:
    """A docstring; an `__all__` of names that are there, sorted; and no private name of another module."""
    tree = parsed(path)
    assert ast.get_docstring(tree)
    (offered,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert offered == sorted(offered, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    private = [name for name in imported(tree) if name.rpartition(".")[2].startswith("_")]
    assert private in ([], ["__future__.annotations"])


# ---- imports -------------------------------------------------------------------------------------------------------


def test_there_are_stages() -> None:
    road = {"load", "capture", "recognize", "calibrate", "distill", "streamify", "lower", "verify", "package"}
    assert road <= STAGES


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_do_not_know_each_other(stage: str) -> None:
    for path in (ROOT / "lhcompile" / stage).rglob("*.py"):
        for name in imported(parsed(path)):
            first, _, rest = name.partition(".")
            if first == "lhcompile":
                assert rest.partition(".")[0] in SHARED | {stage}, f"{module_name(path)} imports {name}"


def test_what_stages_share_knows_no_stage() -> None:
    for part in SHARED:
        for name in imported(parsed(ROOT / "lhcompile" / f"{part}.py")):
            first, _, rest = name.partition(".")
            assert first != "lhcompile" or rest.partition(".")[0] in SHARED, f"{part} imports {name}"


def test_no_module_imports_itself_in_a_circle() -> None:
    names = {module_name(path): path for path in SOURCES}
    edges = {
        name: {found if found in names else found.rpartition(".")[0] for found in imported(parsed(path))} & set(names)
        for name, path in names.items()
    }
    finished: set[str] = set()

    def visit(name: str, road: tuple[str, ...]) -> None:
        assert name not in road, " → ".join((*road[road.index(name) :], name))
        if name not in finished:
            for target in edges[name] - {"lhcompile"}:  # the package's own names are loaded when they are used
                visit(target, (*road, name))
            finished.add(name)

    for name in names.keys() - {"lhcompile"}:
        visit(name, ())


@pytest.mark.parametrize("path", RUNTIME, ids=lambda path: path.name)
def test_the_runtime_needs_numpy_and_onnxruntime_only(path: Path) -> None:
    packages = {name.partition(".")[0] for name in imported(parsed(path))}
    assert packages <= sys.stdlib_module_names | {"numpy", "onnxruntime", "lhruntime"}


@pytest.mark.parametrize("module", ["lhcompile", "lhcompile.cli", "lhcompile.running"])
def test_importing_is_cheap(module: str) -> None:
    """Neither torch nor onnx, and less than a second."""
    code = f"import sys, time; import {module}; print(time.process_time(), {{'torch', 'onnx'}} & set(sys.modules))"
    seconds, _, heavy = python(code).partition(" ")
    assert heavy == "set()"
    assert float(seconds) < 1


# ---- the command line ----------------------------------------------------------------------------------------------

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
OWN = {
    "build": {"model"},
    "inspect": {"model", "json"},
    "verify": {"directory", "against", "calibration", "tokenizer", "sequences"},
}


def test_the_verbs() -> None:
    assert set(COMMANDS) == {"build", "inspect", "verify", "distill", "generate", "bench"}


@pytest.mark.parametrize("verb", OWN)
def test_flags_are_the_fields_of_the_configs(verb: str) -> None:
    sections = BuildConfig.sections().values() if verb == "build" else [LoadConfig]
    fields = {name: field for config in sections for name, field in config.model_fields.items()}
    flags = {parameter.name: parameter for parameter in COMMANDS[verb].params if parameter.name not in OWN[verb]}
    assert flags.keys() == fields.keys()
    for name, field in fields.items():
        assert flags[name].opts[0] == f"--{name.replace('_', '-')}"
        assert flags[name].help == field.description
        assert flags[name].required == field.is_required()
        if not field.is_required():
            assert flags[name].default == field.default


# ---- examples ------------------------------------------------------------------------------------------------------


def test_there_are_examples() -> None:
    assert SCRIPTS
    assert {path.parent for path in SCRIPTS} == {path for path in (ROOT / "examples").iterdir() if path.is_dir()}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_is_run_by_a_test(path: Path) -> None:
    tests = (test.read_text("utf-8") for test in (ROOT / "tests").rglob("test_*.py") if test != Path(__file__))
    assert any(f'"{path.relative_to(ROOT).as_posix()}"' in text for text in tests)
