"""The files that are sent along with a job: the run file, the user's Python files and outlast itself. Never data."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from outlast.cluster.driver.provenance import CODE_FILE, code_state

_PACKAGES = ("checkpointing", "trainers", "cluster")


@contextmanager
def bundle(declared: Mapping[str, Any], code: Path | None) -> Iterator[Path]:
    """Create a temporary folder, whose `work` holds the run file and the user's Python files."""
    with tempfile.TemporaryDirectory(prefix="outlast-submit-") as name:
        folder = Path(name)
        work = folder / "work"
        if code is not None:
            ignore = shutil.ignore_patterns(".*", "__pycache__", "*.pyc")
            shutil.copytree(code, work, ignore=lambda path, names: {*ignore(path, names), *_not_python(path, names)})
        work.mkdir(exist_ok=True)
        if code is not None:
            (work / CODE_FILE).write_text(json.dumps(code_state(code)))
        (work / "run.yaml").write_text(yaml.safe_dump(dict(declared), sort_keys=False))
        yield folder


def _not_python(folder: str, names: list[str]) -> set[str]:
    """Return the files to leave out: of a user's folder only code and settings are sent, no data."""
    kept = (".py", ".json", ".yaml", ".yml", ".toml", ".txt")
    return {name for name in names if (Path(folder) / name).is_file() and not name.endswith(kept)}


def copy_package(folder: Path) -> Path:
    """Copy the installed outlast to an importable folder."""
    from importlib import import_module

    package = folder / "outlast"
    for name in _PACKAGES:
        [source] = import_module(f"outlast.{name}").__path__
        shutil.copytree(source, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    return package
