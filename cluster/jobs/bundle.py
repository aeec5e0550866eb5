"""The files that are sent along with a job: the run file, the user's Python files and outlast itself. Never data."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.driver.code_files import select_code
from outlast.cluster.driver.provenance import CODE_FILE, code_state
from outlast.cluster.formatting import size

_PACKAGES = ("checkpointing", "trainers", "cluster")
#: Ray's limit on a request to its dashboard. A package is sent in one, as a zip without compression.
MAX_PACKAGE_BYTES = 100 * 2**20
#: Of an entry in a zip, beside its content and twice its name.
_ENTRY_BYTES = 160


@contextmanager
def bundle(declared: Mapping[str, Any], code: Path | None) -> Iterator[Path]:
    """Create a temporary folder, whose `work` holds the run file and the user's files. Raises as `check_code`."""
    check_code(code)
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


def check_code(code: Path | None) -> None:
    """Raise ConfigError if the user's files cannot be sent: they cannot be read, or are too large for a job server."""
    if code is None:
        return
    selected = select_code(code)
    if selected.broken:
        listing = "; ".join(f"{name} {reason}" for name, reason in islice(selected.broken.items(), 5))
        hint = f"repair or remove it, or name it in {code}/.outlastignore"
        raise ConfigError(f"the code in {code} cannot be sent: {listing}", hint=hint)
    total = sum(num_bytes + _ENTRY_BYTES + 2 * len(name.encode()) for name, num_bytes in selected.sizes.items())
    if total > MAX_PACKAGE_BYTES:
        entries: Counter[str] = Counter()
        for name, num_bytes in selected.sizes.items():
            top, is_inside, _ = name.partition("/")
            entries[f"{top}/" if is_inside else top] += num_bytes
        largest = ", ".join(f"{name} {size(num_bytes)}" for name, num_bytes in entries.most_common(3))
        name, num_bytes = max(selected.sizes.items(), key=lambda item: item[1])
        raise ConfigError(
            f"the code in {code} has {size(total)}, more than the {size(MAX_PACKAGE_BYTES)} that a job server takes; "
            f"largest: {largest}; largest file: {name} {size(num_bytes)}",
            hint=f"name what is no code in {code}/.outlastignore; data belongs in a storage that all machines share",
        )


def describe_bundle(code: Path | None, *, ship: bool) -> Iterator[str]:
    """Yield one line for each file that is sent, with its size, and for each that is left out by an ignore file or
    because it is no code."""
    yield "sends  run.yaml"
    if code is not None:
        selected = select_code(code)
        yield f"sends  {CODE_FILE} (the commit of {code}, and its uncommitted changes)"
        yield from (f"sends  {name} ({size(selected.sizes[name])})" for name in selected.kept)
        yield from (f"ignores  {name}" for name in selected.ignored)
        for name, count in sorted(selected.no_code.items()):
            yield f"leaves out  {name}" + (f" ({count:,} files)" if count > 1 else "")
    if ship:
        yield "sends  outlast (this version of it)"
    if code is not None:
        yield f"in all {len(selected.kept):,} files of {code}, {size(sum(selected.sizes.values()))}"


def warn_of_code(code: Path | None) -> Iterator[str]:
    """Yield a message for each file of the user that is left out for safety, or seems to contain a credential."""
    if code is not None:
        selected = select_code(code)
        refused = {**selected.refused, **selected.broken}
        yield from (f"{code}/{name} is not sent: it {reason}" for name, reason in refused.items())
        yield from (f"{code}/{name} is sent, and seems to contain a credential" for name in selected.suspicious)


def copy_package(folder: Path) -> Path:
    """Copy the installed outlast to an importable folder."""
    from importlib import import_module

    package = folder / "outlast"
    for name in _PACKAGES:
        [source] = import_module(f"outlast.{name}").__path__
        shutil.copytree(source, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    return package
