"""Prints `k8s/requirements.txt`: every package that the image holds, at the release that is installed here.

python -m tests.support.pin_image_requirements > k8s/requirements.txt
"""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("lora", "s3")
PROJECT = Path(__file__).parents[2] / "pyproject.toml"
#: Built for a device: torch names them itself, at the release that it was built with.
_WITH_TORCH = ("nvidia-", "cuda-", "triton")


def needed(lines: list[str], extras: frozenset[str], found: dict[str, str]) -> None:
    """Adds what these lines of a package need, and what that needs, to `found`."""
    for line in lines:
        wanted = Requirement(line)
        name = canonicalize_name(wanted.name)
        applies = wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in {"", *extras})
        if not applies or name.startswith(_WITH_TORCH):
            continue
        known = f"{name}[{','.join(sorted(wanted.extras))}]" if wanted.extras else name
        if known in found:
            continue
        try:
            found[known] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue  # of another platform, which its marker could not say
        needed(requires(name) or [], frozenset(wanted.extras), found)


def lock() -> str:
    """The text of the file."""
    found: dict[str, str] = {}
    project = tomllib.loads(PROJECT.read_text())["project"]
    extras = [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    needed([*project["dependencies"], *extras], frozenset(), found)
    head = "# The image's packages, pinned. Made by `python -m tests.support.pin_image_requirements`; do not edit.\n"
    return head + "".join(f"{name}=={release}\n" for name, release in sorted(found.items()))


if __name__ == "__main__":
    print(lock(), end="")
