"""What the code imports is declared in pyproject.toml, and what is declared is imported."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_layout import ROOMS, ROOT, imports, sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "dev"}
#: Imported by a library of ours, which is asked for it by name.
ASKED_FOR = {"wandb"}
BROUGHT_BY = packages_distributions()


def names_of(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


NEEDED = names_of(PROJECT["dependencies"])
OPTIONAL = names_of([line for lines in EXTRAS.values() for line in lines])
DEVELOPMENT = names_of(PROJECT["optional-dependencies"]["dev"])


def distributions(module: str) -> set[str]:
    """Which distributions bring a module; none for the standard library and our own code."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in ("outlast", "tests", "benchmarks"):
        return set()
    return {canonicalize_name(name) for name in BROUGHT_BY.get(top, [top])}


def undeclared(paths: list[Path], declared: set[str]) -> dict[str, set[str]]:
    """Modules that no declared distribution brings, with the files that import them."""
    found: dict[str, set[str]] = {}
    for path in paths:
        for module in imports(path):
            brought_by = distributions(module)
            if brought_by and not brought_by & declared:
                found.setdefault(module, set()).add(path.name)
    return found


def imports_at_once(path: Path) -> Iterator[str]:
    """Every module that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


ROOM_FILES = [path for room in ROOMS for path in sources(room)]


def test_every_import_is_declared() -> None:
    assert undeclared(ROOM_FILES, NEEDED | OPTIONAL) == {}


def test_an_extra_is_imported_only_where_it_is_used() -> None:
    """So that the module can be imported without it."""
    at_once = {
        path.name: {name for module in imports_at_once(path) for name in distributions(module)} for path in ROOM_FILES
    }
    assert {name: used for name, found in at_once.items() if (used := found & (OPTIONAL - NEEDED))} == {}


def test_every_declared_distribution_is_imported() -> None:
    used = {name for path in ROOM_FILES for module in imports(path) for name in distributions(module)}
    assert (NEEDED | OPTIONAL) - used == ASKED_FOR


def test_what_tests_and_benchmarks_import_is_declared() -> None:
    paths = [path for folder in ("tests", "benchmarks", "examples", "docs") for path in sources(folder)]
    assert undeclared(paths, NEEDED | OPTIONAL | DEVELOPMENT) == {}


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)])
def test_each_has_a_lower_bound(line: str) -> None:
    assert any(item.operator == ">=" for item in Requirement(line).specifier)


def test_the_scan_sees_what_is_not_declared(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import json\nimport torch.nn\ndef f():\n    import pluggy\n    from nowhere import x\n")
    assert undeclared([path], {"torch"}) == {
        "pluggy": {"module.py"},
        "nowhere": {"module.py"},
        "nowhere.x": {"module.py"},
    }
    assert list(imports_at_once(path)) == ["json", "torch.nn"]
