"""docs/reference/settings.md says what the code says."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

DOCS = Path(__file__).parent.parent / "docs"


@cache
def load_reference() -> ModuleType:
    """docs/reference.py, which is a script and no part of a package."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_code_says() -> None:
    stale = "docs/reference/settings.md differs from the code; make it anew: .venv/bin/python docs/reference.py"
    assert (DOCS / "reference/settings.md").read_text() == load_reference().page(), stale


def test_every_setting_and_every_verb_is_in_it() -> None:
    """By other ways than the generator's own."""
    from outlast.cluster.config import load_run
    from outlast.trainers.registry import TASKS

    text = (DOCS / "reference/settings.md").read_text()
    config, _ = load_run(str(DOCS.parent / "examples/own_task.yaml"))
    for block, settings in config.model_dump(by_alias=True).items():
        names = [f"{block}.{name}" for name in settings] if isinstance(settings, dict) else [block]
        assert [name for name in names if f"| `{name}` |" not in text] == []
    for verb in ("train RUN.yaml", "checkpoints prune RUN", "k8s render RUN.yaml", "try RUN", "doctor [RUN.yaml]"):
        assert f"### `outlast {verb} " in text
    assert [task for task in TASKS if task not in text] == []
