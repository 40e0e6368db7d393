"""The house plan: no import cycles, no long files, no long functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]
LINES, FUNCTION = 400, 60


def sources() -> list[Path]:
    return [path for folder in ("modiff", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = grimp.build_graph("modiff", exclude_type_checking_imports=False)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    while free := {module for module, needed in imports.items() if not needed}:
        imports = {module: needed - free for module, needed in imports.items() if module not in free}
    assert sorted(imports) == [], "these import each other"


def test_files_are_short() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert {name: lines for name, lines in long.items() if lines > LINES} == {}


def test_functions_are_short() -> None:
    assert {name: lines for path in sources() for name, lines in functions(path) if lines > FUNCTION} == {}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1
