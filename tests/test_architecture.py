"""The three rules of the house, and the habits that keep it readable, checked by machine."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "diffing_core").rglob("*.py"))
ASSETS = sorted((ROOT / "diffing_assets").rglob("*.py"))
SOURCES = [*CORE, *ASSETS, *sorted((ROOT / "dbt_reports").glob("*.py"))]
HEAVY = {"torch", "transformers", "peft", "nnsight", "vllm", "sklearn", "scipy", "dictionary_learning", "polars"}
MAX_LINES, MAX_BODY, MAX_ARGUMENTS = 400, 60, 7


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CORE, ids=relative)
def test_core_knows_no_orchestrator_and_no_ui(path: Path) -> None:
    forbidden = {"dagster", "dagster_dbt", "dbt", "streamlit", "diffing_assets", "dbt_reports"}
    assert not imported(ast.parse(path.read_text())) & forbidden


@pytest.mark.parametrize("path", ASSETS, ids=relative)
def test_assets_hold_no_mathematics(path: Path) -> None:
    assert not imported(ast.parse(path.read_text())) & (HEAVY | {"numpy", "math", "statistics"})


@pytest.mark.parametrize("path", ASSETS, ids=relative)
def test_assets_have_no_future_annotations(path: Path) -> None:
    """With them Dagster cannot resolve a context or config parameter."""
    assert "from __future__ import annotations" not in path.read_text()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert node.end_lineno - node.body[0].lineno < MAX_BODY, node.name
            assert len([each for each in arguments if each.arg != "self"]) <= MAX_ARGUMENTS, node.name


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_module_and_public_function_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "module docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            decorated = [ast.unparse(each) for each in node.decorator_list]
            if not any("dg." in each for each in decorated):
                assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_broad_except_and_no_print(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"line {node.lineno}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}"


def test_a_method_is_found_by_its_file_name_and_has_its_own_test() -> None:
    from diffing_core.methods import all_methods

    for name in all_methods():
        assert (ROOT / "tests" / "core" / "methods" / f"test_{name}.py").exists(), name


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_loading_the_definitions_loads_no_heavy_library() -> None:
    assert not loaded_by("import diffing_assets.definitions") & HEAVY


def test_the_compute_path_needs_no_platform() -> None:
    """It must run on a bare GPU image: torch, transformers, peft, numpy, pyarrow, pydantic and yaml only."""
    blocked = "import sys\nfor name in ('dagster', 'duckdb', 'polars', 'nnsight', 'openai', 'typer'): sys.modules[name] = None"
    loaded = loaded_by(f"{blocked}\nimport diffing_core.comparison, diffing_core.methods as m\nm.all_methods()")
    assert "diffing_core" in loaded


def test_no_key_or_secret_is_tracked() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in tracked if Path(name).suffix in {".pem", ".key", ".env"} or Path(name).name == ".env"]


def test_the_linter_is_content() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
