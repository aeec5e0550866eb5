"""`k8s/Dockerfile`: what it pins; and, where buildah, podman and debootstrap are at hand, really built and started.

Building takes about ten minutes: a base from Debian's packages, then every wheel of the lock.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from outlast.cluster.kubernetes.settings import k8s_settings
from tests.support.kubernetes.manifests import ROOT

LOCKS = (ROOT / "k8s" / "requirements.txt", ROOT / "k8s" / "requirements-torch.txt")
NEEDED = ("buildah", "podman", "runc", "debootstrap")
IMAGE = "localhost/outlast:test"


def pins() -> dict[str, Requirement]:
    lines = [line.removesuffix(" \\") for lock in LOCKS for line in lock.read_text().splitlines() if "==" in line]
    return {canonicalize_name(item.name): item for item in map(Requirement, lines)}


def test_every_package_has_digests() -> None:
    for lock in LOCKS:
        for package in re.split(r"^(?=\w)", lock.read_text(), flags=re.MULTILINE)[1:]:
            first, *digests = package.rstrip().split(" \\\n")
            assert re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", first), first
            assert digests, first
            assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", digest) for digest in digests), first
    dockerfile = (ROOT / "k8s" / "Dockerfile").read_text()
    assert dockerfile.count("--require-hashes -r requirements") == 2


def release_of(item: Requirement) -> str:
    return re.fullmatch(r"==([\w.]+)", str(item.specifier))[1]  # type: ignore[index]


def test_the_lock_pins_what_outlast_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for key in ("lora", "s3") for line in project["optional-dependencies"][key]]
    for line in [*project["dependencies"], *extras]:
        wanted = Requirement(line)
        pin = pins()[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(release_of(pin)), line
        assert wanted.extras <= pin.extras


def test_the_pins_agree_with_each_other() -> None:
    """As far as these releases are installed here: only an installed package has its requirements."""
    known = {name: release_of(pin) for name, pin in pins().items()}
    asked = 0
    for name, pin in pins().items():
        try:
            is_here = version(name).partition("+")[0] == known[name]
        except PackageNotFoundError:
            is_here = False
        for wanted in map(Requirement, requires(name) or []) if is_here else ():
            needed = canonicalize_name(wanted.name)
            applies = wanted.marker is None or any(wanted.marker.evaluate({"extra": key}) for key in {"", *pin.extras})
            if applies and needed in known:
                asked += 1
                assert wanted.specifier.contains(known[needed]), f"{name} needs {wanted}, and {known[needed]} is pinned"
    assert asked > 100


def test_ray_in_the_image_is_that_of_the_manifests() -> None:
    assert release_of(pins()["ray"]) == k8s_settings(image="a:1").ray_version
    assert {"default", "train"} <= pins()["ray"].extras
    rendered = (ROOT / "k8s" / "base" / "rendered.yaml").read_text()
    assert f'rayVersion: "{release_of(pins()["ray"])}"' in rendered
    assert f"torch=={release_of(pins()['torch'])}" in (ROOT / "constraints.txt").read_text()


def test_the_dockerfile_is_pinned_and_has_no_root() -> None:
    text = (ROOT / "k8s" / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line.split()[1] for line in lines if line.startswith("FROM")] == ["${BASE}", "${BASE}"]
    assert re.search(r"^ARG BASE=\S+:\d+\.\d+\.\d+-\S+$", text, re.MULTILINE)
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    assert "latest" not in text


def why_not() -> str | None:
    """Return why no image can be built here, or None."""
    if os.geteuid() != 0:
        return "building needs root"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return f"building needs {', '.join(missing)} (Debian's packages of these names)" if missing else None


def run(*command: str, timeout_s: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, **options)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def pip_settings(folder: Path) -> list[str]:
    """Return options that give pip in a build this machine's settings: a file, and the paths that it names."""
    listing = run(sys.executable, "-m", "pip", "config", "list").stdout
    found = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listing, re.MULTILINE))
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in found.items()))
    words = [word for value in found.values() for word in value.split()]
    paths = [word for word in words if Path(word).is_absolute()]
    paths += [str(Path(urlsplit(word).path).parent) for word in words if word.startswith("file:")]  # an index's files
    binds = [f"{path}:{path}:ro" for path in dict.fromkeys(paths) if Path(path).exists()]
    return [part for bind in (f"{file}:/etc/pip.conf:ro", *binds) for part in ("--volume", bind)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Options of buildah and podman: a temporary store of our own."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("containers")
    yield ["--root", str(folder / "store"), "--runroot", str(folder / "run"), "--storage-driver", "overlay"]
    subprocess.run(["umount", "-R", str(folder / "store" / "overlay")], capture_output=True)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def base(engine: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Debian with Python 3.11, from Debian's packages."""
    folder = tmp_path_factory.mktemp("debian")
    packages = "python3,python3-venv,ca-certificates"
    run("debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(folder), timeout_s=600)
    shutil.rmtree(folder / "var" / "cache" / "apt", ignore_errors=True)
    made = run("buildah", *engine, "from", "scratch").stdout.strip()
    run("buildah", *engine, "add", made, str(folder), "/", timeout_s=300)
    run("buildah", *engine, "commit", "--rm", made, "localhost/base:bookworm", timeout_s=300)
    shutil.rmtree(folder)
    return "localhost/base:bookworm"


@pytest.fixture(scope="module")
def image(engine: list[str], base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    arguments = ["--build-arg", f"BASE={base}", "--network", "host", "--runtime", "runc", "--tag", IMAGE]
    settings = pip_settings(tmp_path_factory.mktemp("pip"))
    if "TORCH_INDEX" in os.environ:
        arguments += ["--build-arg", f"TORCH_INDEX={os.environ['TORCH_INDEX']}"]
    arguments += settings
    run("buildah", *engine, "bud", *arguments, "--file", "k8s/Dockerfile", ".", timeout_s=1200, cwd=ROOT)
    return IMAGE


def inside(engine: list[str], image: str, *command: str, timeout_s: float = 120) -> str:
    """Run a command as in a restricted pod: no capabilities, no new privileges, no network."""
    podman = ["podman", *engine, "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
    limits = ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none", "--shm-size", "1g"]
    # podman would raise these two, which root may not everywhere.
    limits += ["--ulimit", f"nofile={resource.getrlimit(resource.RLIMIT_NOFILE)[0]}", "--ulimit", "nproc=10000"]
    return run(*podman, "run", "--rm", *limits, image, *command, timeout_s=timeout_s).stdout


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_it_is_built_and_a_demo_runs_in_it(engine: list[str], image: str) -> None:
    assert inside(engine, image, "id", "-u").strip() == "1000"
    assert inside(engine, image, "bash", "-c", "echo $HOME && touch $HOME/mine").strip() == "/home/ray"
    ray = release_of(pins()["ray"])
    assert inside(engine, image, "python", "-c", "import ray; print(ray.__version__)").strip() == ray
    # The commands that KubeRay runs before `ray start`, and to probe a dashboard.
    output = inside(engine, image, "bash", "-c", "ulimit -n 65536; ray --version && which python")
    assert output.split()[-1] == "/opt/outlast/bin/python"
    demo = "outlast demo --json demo.json && cat demo.json"
    found = json.loads(inside(engine, image, "bash", "-c", demo, timeout_s=600))
    assert found["resumed_from"] > 0
    assert found["equal"]
    assert all(found["equal"].values())
