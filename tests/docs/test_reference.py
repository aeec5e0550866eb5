"""docs/reference/settings.md and commands.md agree with the code."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@cache
def load_reference() -> ModuleType:
    """docs/reference.py, which is a script outside of any package."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings.md", "commands.md"])
def test_a_page_is_up_to_date(name: str) -> None:
    stale = f"docs/reference/{name} differs from the code; generate it again: .venv/bin/python docs/reference.py"
    assert (DOCS / "reference" / name).read_text() == load_reference().pages()[name], stale


def test_every_setting_and_every_command_is_there() -> None:
    """Found without the generator's own walk over settings and commands."""
    from outlast.cluster.config.run_file import load_run
    from outlast.trainers.config.task_table import TASKS

    settings = (DOCS / "reference/settings.md").read_text()
    commands = (DOCS / "reference/commands.md").read_text()
    config, _ = load_run(str(DOCS.parent / "examples/own_task.yaml"))
    for block, values in config.model_dump(by_alias=True).items():
        names = [f"{block}.{name}" for name in values] if isinstance(values, dict) else [block]
        assert [name for name in names if f"| `{name}` |" not in settings] == []
    for verb in ("train RUN.yaml", "checkpoints prune RUN", "k8s render RUN.yaml", "try RUN", "doctor [RUN.yaml]"):
        assert f"## `outlast {verb} " in commands
    assert [task for task in TASKS if task not in settings] == []
