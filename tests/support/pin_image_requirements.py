"""Prints `k8s/requirements.txt`: every package that the image holds, at the release that is installed here.

python -m tests.support.pin_image_requirements > k8s/requirements.txt
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = {"lora", "s3"}
#: Built for a device: torch names them itself, at the release that it was built with.
_WITH_TORCH = ("nvidia-", "cuda-", "triton")


def needed(package: str, extras: frozenset[str], found: dict[str, str]) -> None:
    """Adds what a package needs, and what that needs, to `found`."""
    for line in requires(package) or []:
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
        needed(name, frozenset(wanted.extras), found)


def lock() -> str:
    """The text of the file."""
    found: dict[str, str] = {}
    needed("outlast", frozenset(EXTRAS), found)
    found = {name: release for name, release in found.items() if not name.startswith("outlast")}
    head = "# The image's packages, pinned. Made by `python -m tests.support.pin_image_requirements`; do not edit.\n"
    return head + "".join(f"{name}=={release}\n" for name, release in sorted(found.items()))


if __name__ == "__main__":
    print(lock(), end="")
