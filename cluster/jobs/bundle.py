"""The files that are sent along with a job: the run file, the user's Python files and outlast itself. Never data."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from outlast.cluster.driver.code_files import select_code
from outlast.cluster.driver.provenance import CODE_FILE, code_state

_PACKAGES = ("checkpointing", "trainers", "cluster")


@contextmanager
def bundle(declared: Mapping[str, Any], code: Path | None) -> Iterator[Path]:
    """Create a temporary folder, whose `work` holds the run file and the user's Python files."""
    with tempfile.TemporaryDirectory(prefix="outlast-submit-") as name:
        folder = Path(name)
        work = folder / "work"
        work.mkdir()
        if code is not None:
            for kept in select_code(code).kept:
                (work / kept).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(code / kept, work / kept)
            (work / CODE_FILE).write_text(json.dumps(code_state(code)))
        (work / "run.yaml").write_text(yaml.safe_dump(dict(declared), sort_keys=False))
        yield folder


def describe_bundle(code: Path | None, *, ship: bool) -> Iterator[str]:
    """Yield one line for each file that is sent, and for each that is left out by an ignore file."""
    yield "sends  run.yaml"
    if code is not None:
        selected = select_code(code)
        yield f"sends  {CODE_FILE} (the commit of {code}, and its uncommitted changes)"
        yield from (f"sends  {name}" for name in selected.kept)
        yield from (f"ignores  {name}" for name in selected.ignored)
    if ship:
        yield "sends  outlast (this version of it)"


def warn_of_code(code: Path | None) -> Iterator[str]:
    """Yield a message for each file of the user that is left out for safety, or seems to contain a credential."""
    if code is not None:
        selected = select_code(code)
        yield from (f"{code}/{name} is not sent: it {reason}" for name, reason in selected.refused.items())
        yield from (f"{code}/{name} is sent, and seems to contain a credential" for name in selected.suspicious)


def copy_package(folder: Path) -> Path:
    """Copy the installed outlast to an importable folder."""
    from importlib import import_module

    package = folder / "outlast"
    for name in _PACKAGES:
        [source] = import_module(f"outlast.{name}").__path__
        shutil.copytree(source, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    return package
