"""Private parts of other libraries are imported in one file of each room, where a test holds their shape."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.test_layout import ROOT, imports, sources

#: Modules of the library that change without notice, beside those with an underscore.
INTERNALS = {
    "ray": ("cluster/ray_internals.py", ("ray.train.v2", "ray.core")),
    "threading": ("checkpointing/save/exit_hook.py", ()),
    "torch": ("checkpointing/torch_internals.py", ()),
    "transformers": (
        "trainers/models/transformers_internals.py",
        (
            "transformers.conversion_mapping",
            "transformers.core_model_loading",
            "transformers.dynamic_module_utils",
            "transformers.initialization",
        ),
    ),
}


def private(path: Path, library: str, others: tuple[str, ...] = ()) -> list[str]:
    """What a file takes from private modules of a library, by an import or by an attribute of the library."""
    tree = ast.parse(path.read_text())
    attributes = (ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    names = {*imports(path), *(name for name in attributes if name.replace(".", "_").isidentifier())}
    return sorted(
        name
        for name in names
        if name.startswith(f"{library}.")
        and (
            any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
            or name.startswith(others or "!")
        )
    )


@pytest.mark.parametrize("library", INTERNALS)
def test_private_parts_have_one_address(library: str) -> None:
    address, others = INTERNALS[library]
    assert private(ROOT / address, library, others)
    found = {
        str(path.relative_to(ROOT)): names
        for room in ("checkpointing", "trainers", "cluster")
        for path in sources(room)
        if (names := private(path, library, others))
    }
    found.pop(address, None)
    assert found == {}


def test_the_scan_sees_a_private_part(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(
        "def f():\n    from torch import _C\n    import torch.nn\n    return torch._dynamo.config, torch.nn.x\n"
    )
    assert private(path, "torch") == ["torch._C", "torch._dynamo", "torch._dynamo.config"]
