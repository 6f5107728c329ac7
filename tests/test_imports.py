"""Who may import whom, read from the source of every file: model <- trainer <- tools.

`deepspeed` is imported by the few files that talk to it, kernel packages inside functions of their backend file,
and no module-level imports go round in a circle.
"""

import ast
import graphlib
import importlib.metadata
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("model", "trainer", "tools")
FORBIDDEN = {"model": {"trainer", "tools", "tests", "deepspeed"}, "trainer": {"tools", "tests"}, "tools": {"tests"}}
KERNEL_FILES = {"flash_attn": "model/attention/flash_attn.py", "megablocks": "model/moe/megablocks.py",
                "grouped_gemm": "model/moe/megablocks.py", "triton": "model/moe/megablocks.py"}
DEEPSPEED_FILES = {"trainer/engine.py", "trainer/expert_parallel.py", "trainer/launch.py",
                   "trainer/parameter_groups.py", "trainer/snapshot.py", "tools/conversion/reshard.py",
                   "tools/conversion/universal.py"}


class Import(NamedTuple):
    file: str
    line: int
    names: tuple[str, ...]
    """The imported module, and, for `from module import x`, module.x as well: x may be a module."""
    at_module_level: bool

    @property
    def package(self) -> str:
        return self.names[0].partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.names[0]}"


def _imports(path: Path) -> list[Import]:
    found = []

    def visit(node: ast.AST, at_module_level: bool) -> None:
        for child in ast.iter_child_nodes(node):
            names = []
            if isinstance(child, ast.Import):
                names = [(alias.name,) for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: a relative import"
                names = [(child.module, *(f"{child.module}.{alias.name}" for alias in child.names))]
            elif isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("import_module", "__import__")):
                if child.args and isinstance(child.args[0], ast.Constant):
                    names = [(child.args[0].value,)]
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            file = path.relative_to(ROOT).as_posix()
            found.extend(Import(file, child.lineno, each, at_module_level) for each in names)
            visit(child, at_module_level and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


FILES = {path.relative_to(ROOT).as_posix(): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}
IMPORTS = [each for path in FILES.values() for each in _imports(path)]


def test_there_is_something_to_check():
    assert all(any(each.file.startswith(f"{room}/") for each in IMPORTS) for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_only(room):
    assert [str(i) for i in IMPORTS if i.file.startswith(f"{room}/") and i.package in FORBIDDEN[room]] == []


def test_only_a_few_files_import_deepspeed():
    assert [str(i) for i in IMPORTS if i.package == "deepspeed" and i.file not in DEEPSPEED_FILES] == []


@pytest.mark.parametrize("package", KERNEL_FILES)
def test_kernels_are_imported_inside_functions_of_their_backend_file(package):
    assert [str(i) for i in IMPORTS if i.package == package
            and (i.at_module_level or i.file != KERNEL_FILES[package])] == []


def test_no_circle_of_imports():
    modules = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in FILES}
    graph = {file: {modules[name] for i in IMPORTS if i.file == file and i.at_module_level
                    for name in i.names if name in modules} - {file} for file in FILES}
    assert any(graph.values())
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_trainer_hides_no_other_module():
    """`deepspeed trainer/run.py` puts trainer/ itself on the path, so its names must not be those of others."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    names = {path.stem for path in (ROOT / "trainer").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names - {"__pycache__", "__init__"}
    assert names & taken == set()
