"""docs/reference/events.md agrees with the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from outlast.checkpointing.run_store.events import KINDS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date() -> None:
    code = f"import sys; sys.path.insert(0, {str(DOCS)!r}); import events; print(events.page(), end='')"
    page = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    stale = "docs/reference/events.md differs from the code; generate it again: .venv/bin/python docs/events.py"
    assert (DOCS / "reference/events.md").read_text() == page, stale


def test_every_kind_and_every_field_is_there() -> None:
    """Found without the generator's own walk over classes."""
    text = (DOCS / "reference/events.md").read_text()
    assert [kind for kind in KINDS if f"### `{kind}`\n" not in text] == []
    for name in ("grad_norm", "blocked_s", "noticed_at", "eval_loss", "between_failures_s", "threads"):
        assert f"`{name}`" in text
