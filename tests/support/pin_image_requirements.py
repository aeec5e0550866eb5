"""Writes the image's packages, pinned with the digests of all their files, for pip's `--require-hashes`.

    pip install pip-tools
    python -m tests.support.pin_image_requirements

The releases are those installed here, and what torch's build for GPUs needs besides. `k8s/requirements-torch.txt` holds
that build, so that an image for CPUs can take another one.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("lora", "s3")
ROOT = Path(__file__).parents[2]
#: Built for a device: torch names them itself, at the release that it was built with.
_WITH_TORCH = ("nvidia-", "cuda-", "triton")
_HEAD = "# Packages of the image, pinned. Made by `python -m tests.support.pin_image_requirements`; do not edit.\n"


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


def installed() -> str:
    """The packages that outlast needs, a line each, at the releases installed here."""
    found: dict[str, str] = {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for name in EXTRAS for line in project["optional-dependencies"][name]]
    needed([*project["dependencies"], *extras], frozenset(), found)
    return "".join(f"{name}=={release}\n" for name, release in sorted(found.items()))


def with_digests(lines: str) -> str:
    """The same packages and what they need besides, with the digests in the package index; builds of this machine's
    own do not count."""
    options = "--quiet --generate-hashes --allow-unsafe --no-emit-index-url --no-emit-find-links --no-annotate"
    options += " --no-header --no-strip-extras"
    with tempfile.TemporaryDirectory() as folder:
        (given := Path(folder, "given.txt")).write_text(lines)
        environment = {name: value for name, value in os.environ.items() if name != "PIP_FIND_LINKS"}
        command = ["pip-compile", *options.split(), "--output-file", f"{folder}/made.txt", str(given)]
        subprocess.run(command, check=True, env={**environment, "PIP_CONFIG_FILE": os.devnull})
        return Path(folder, "made.txt").read_text()


def main() -> None:
    """Writes both files."""
    text = re.sub(r"^#.*\n|^\n", "", with_digests(installed()), flags=re.MULTILINE)
    packages = sorted(re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:])
    of_torch = [text for text in packages if text.startswith(("torch==", *_WITH_TORCH))]
    others = [text for text in packages if text not in of_torch]
    (ROOT / "k8s" / "requirements.txt").write_text(_HEAD + "".join(others))
    (ROOT / "k8s" / "requirements-torch.txt").write_text(_HEAD + "".join(of_torch))


if __name__ == "__main__":
    main()
