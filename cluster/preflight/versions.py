"""What a bug report needs to say of this installation. Imports none of what it names."""

from __future__ import annotations

import platform
import runpy
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from outlast.cluster.preflight.doctor_probe import find_gpus

_ALWAYS = ("outlast", "ray", "torch", "transformers", "accelerate", "pyarrow", "numpy", "pydantic", "tokenizers")
_PERHAPS = ("safetensors", "peft", "datasets", "boto3", "tensorboard", "mlflow", "mlflow-skinny", "wandb")


def versions() -> dict[str, Any]:
    """Versions, the platform, torch's build and the GPUs; of what is not installed, None."""
    libraries = {name: _version(name) for name in (*_ALWAYS, *_PERHAPS)}
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
    """The CUDA release that torch was built for; None for a build without."""
    spec = find_spec("torch")
    for folder in (spec.submodule_search_locations if spec else None) or ():
        found: str | None = runpy.run_path(str(Path(folder) / "version.py")).get("cuda")
        return found
    return None
