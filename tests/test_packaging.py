"""What a user installs: the wheel holds the three packages whole, and nothing else; what is sent along does too."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from outlast.cluster.jobs.bundle import copy_package

ROOT = Path(__file__).parents[1]
PACKAGES = ("checkpointing", "trainers", "cluster")
PAGE = {f"outlast/cluster/monitoring/report/{name}" for name in ("report.html", "report.css", "report.js")} | {
    f"outlast/cluster/monitoring/report/uplot.{name}" for name in ("min.js", "min.css", "LICENSE")
}
#: Ours, and that of the chart library in the report.
LICENSES = {"LICENSE", "cluster/monitoring/report/uplot.LICENSE"}


def test_wheel_contents(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("outlast-*.whl")
    inside_wheel = zipfile.ZipFile(wheel)
    names = {name for name in inside_wheel.namelist() if ".dist-info/" not in name}
    licenses = {name.partition("/licenses/")[2] for name in inside_wheel.namelist() if "/licenses/" in name}
    assert licenses == LICENSES
    [metadata] = [name for name in inside_wheel.namelist() if name.endswith(".dist-info/METADATA")]
    assert "License-Expression: Apache-2.0\n" in inside_wheel.read(metadata).decode()
    sources = {f"outlast/{path.relative_to(ROOT)}" for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    manifests = {
        f"outlast/{path.relative_to(ROOT)}"
        for path in (ROOT / "k8s").rglob("*")
        if path.is_file() and (path.suffix in (".py", ".yaml", ".json") or path.name == "Dockerfile")
    }
    assert len(manifests) > 20
    assert names == sources | manifests | PAGE | {f"outlast/{name}/py.typed" for name in PACKAGES}
    [archive] = tmp_path.glob("outlast-*.tar.gz")
    with tarfile.open(archive) as inside:
        carried = {"outlast/" + name.partition("/")[2] for name in inside.getnames()}
    assert carried >= PAGE | {f"outlast/{name}" for name in LICENSES}


def test_a_submission_carries_the_page_too(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    assert {f"outlast/{path.relative_to(package)}" for path in package.rglob("*") if path.is_file()} >= PAGE
