"""What a user installs: the wheel holds the three packages whole, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("checkpointing", "trainers", "cluster")


def test_wheel_contents(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("outlast-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {f"outlast/{name}/{path.name}" for name in PACKAGES for path in (ROOT / name).glob("*.py")}
    manifests = {
        f"outlast/{path.relative_to(ROOT)}"
        for path in (ROOT / "k8s").rglob("*")
        if path.is_file() and (path.suffix in (".py", ".yaml") or path.name == "Dockerfile")
    }
    assert len(manifests) > 20
    assert names == sources | manifests | {f"outlast/{name}/py.typed" for name in PACKAGES}
