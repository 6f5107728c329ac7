"""The source files that an exported model needs, side by side in one folder, with imports to match.

transformers loads code from a folder of flat files: `model/attention/plan.py` becomes `attention_plan.py`, and
`from model.attention.plan import x` becomes `from .attention_plan import x`. Nothing else is changed, so that what is
exported is what is tested here. Kernel packages, which are imported where they are first used, are put under `try`:
transformers otherwise asks for them beforehand.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[2]
_PACKAGE = "model"
_EXPECTED = {"torch", "transformers", "tokenizers", "safetensors", "numpy"}


def flatten(entry: Path) -> dict[str, str]:
    """File name -> text of `entry` (under its own name) and of everything of `model/` that it needs."""
    found = {entry.name: entry}
    waiting = [entry]
    while waiting:
        for module in sorted(_needed(waiting.pop())):
            path = _path(module)
            if _flat(module) + ".py" not in found:
                found[_flat(module) + ".py"] = path
                waiting.append(path)
    return {name: _rewritten(path) for name, path in found.items()}


def _path(module: str) -> Path:
    return _REPOSITORY.joinpath(*module.split(".")).with_suffix(".py")


def _flat(module: str) -> str:
    return "_".join(module.split(".")[1:])


def _imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]


def _modules_in(node: ast.Import | ast.ImportFrom) -> dict[str, str]:
    """Names that `from model.moe import cpu` binds to modules, with those modules; empty where it names contents."""
    if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != _PACKAGE:
        return {}
    found = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: module for name, module in found.items() if _path(module).exists()}


def _needed(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    needed = set()
    for node in _imports(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == _PACKAGE:
            needed |= set(_modules_in(node).values()) or {node.module}
    return needed


def _rewritten(path: Path) -> str:
    lines = path.read_text().splitlines()
    for node in sorted(_imports(path), key=lambda node: node.lineno, reverse=True):
        indent = " " * node.col_offset
        if replacement := _replacement(node):
            lines[node.lineno - 1:node.end_lineno] = [indent + line for line in replacement]
    return "\n".join(lines) + "\n"


def _replacement(node: ast.Import | ast.ImportFrom) -> list[str]:
    """What stands in the place of an import; empty where it stays."""
    if modules := _modules_in(node):
        # The first line of each is for transformers, which copies the files it finds so, and no others.
        return [line for name, module in modules.items()
                for line in (f"from .{_flat(module)} import __name__ as _", f"from . import {_flat(module)} as {name}")]
    top = (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
    if top == _PACKAGE:
        names = ", ".join(ast.unparse(alias) for alias in node.names)
        return [f"from .{_flat(node.module)} import {names}"]
    if top in _EXPECTED or top in sys.stdlib_module_names:
        return []
    return ["try:", "    " + ast.unparse(node), "except ImportError:", "    raise"]
