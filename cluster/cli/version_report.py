"""Versions for a bug report. Must import none of the packages that it reports: one of them may be broken."""

import platform
import runpy
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from outlast.cluster.preflight.doctor_probe import find_gpus

_REQUIRED = ("outlast", "ray", "torch", "transformers", "accelerate", "pyarrow", "numpy", "pydantic", "tokenizers")
_OPTIONAL = ("safetensors", "peft", "datasets", "boto3", "tensorboard", "mlflow", "mlflow-skinny", "wandb")


def versions() -> dict[str, Any]:
    """Return versions (None if not installed), the platform, torch's build and the GPUs."""
    libraries = {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **libraries,
        "torch_cuda": _torch_cuda(),
        "gpus": [gpu["name"] for gpu in find_gpus()],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    """Return the CUDA release that torch was built for; None for a CPU build."""
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        release: str | None = runpy.run_path(str(Path(folder) / "version.py")).get("cuda")
        return release
    return None
