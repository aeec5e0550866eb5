"""A storage that a stranger wrote: no command lets it act on a terminal, forge a line, or print a credential."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from outlast.checkpointing import Checkpointer
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.events import GroupFailureEvent, ResizeEvent
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.cli import main as command_line
from tests.cluster.test_output import acting

FORGED = "\nwhole 100 MB forged"
HOSTILE = f"a\x1b[2J\x1b]0;b\x07\x9b1m\u202e\r[bold]{FORGED}"
URL = "https://me:canary-1@host?token=canary-2"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose claim, events, metrics and file names are hostile; checkpoint-3 is damaged."""
    storage = LocalStorage(tmp_path_factory.mktemp("hostile"))
    model = torch.nn.Linear(2, 2)
    model.register_parameter(f"w{HOSTILE}".replace(".", "-"), torch.nn.Parameter(torch.ones(2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    store = RunStore(storage, "run")
    workers = [{"rank": 0, "host": HOSTILE, "log": HOSTILE, "pid": 1}]
    notes = {"settings": {"name": "run", "note": HOSTILE}, "workers": workers, "record": HOSTILE}
    checkpointer = Checkpointer(storage, "run", launch="launch", notes=notes, declaration={"note": HOSTILE})
    checkpointer.resume(model, optimizer)
    checkpointer.save(1, model, optimizer, {}, metrics={f"eval_{HOSTILE}": 1.0})
    checkpointer.declaration["note"] = f"{HOSTILE} {URL}"
    checkpointer.save(2, model, optimizer, {})
    checkpointer.save(3, model, optimizer, {})
    checkpointer.close() if hasattr(checkpointer, "close") else checkpointer.flush()
    [attempt] = list_attempts(store)
    damaged = storage.path(f"{store.attempt_dir(attempt)}/checkpoint-3")
    for path in damaged.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    (damaged / f"extra{HOSTILE}".replace("/", "-").replace("\x00", "")).write_text("x")
    journal = Journal(storage, store.launch_dir("launch"), 0, flush_s=0)
    failed = {
        "event": GroupFailureEvent.kind,
        "attempt": str(attempt),
        "cause": HOSTILE,
        "message": f"{HOSTILE} {URL}",
        "where": HOSTILE,
        "rank": 0,
    }
    journal.write(ResizeEvent(attempt=str(attempt), before=2, now=1))
    folder = storage.path(store.launch_dir("launch"))
    [segment] = folder.glob("events-0-*.jsonl")
    with segment.open("a") as file:  # as an earlier release or a stranger wrote it: not redacted
        file.write(json.dumps({"t": 1.0, **failed}) + "\n")
    (folder / "alive.json").write_text(json.dumps({"began": 1.0, "t": 2.0, "host": HOSTILE, "error": HOSTILE}))
    storage.path(f"odd{HOSTILE}".replace("/", "-")).mkdir()
    return storage.path("run")


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command in this process; returns all of its output."""

    def run_command(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["outlast", *arguments])
        with pytest.raises(SystemExit):
            command_line.main()
        captured = capsys.readouterr()
        return captured.out + captured.err

    return run_command


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("status RUN", r"\\x1b\[2J"),
        ("status RUN --json", r"\\u001b\[2J"),
        ("list --storage ROOT", "run"),
        ("checkpoints ls RUN", r"eval_a\\x1b\[2J"),
        ("checkpoints ls RUN --json", r"\\u001b\[2J"),
        ("checkpoints show RUN 1", r"\\x1b\[2J"),
        ("checkpoints verify RUN", r"damaged"),
        ("checkpoints verify RUN --json", r"damaged|faults"),
        ("checkpoints diff RUN 1 2", r"\\x1b\[2J"),
        ("checkpoints path RUN newest", "checkpoint-3"),
        ("checkpoints prune RUN", "keep"),
        ("checkpoints pin RUN 7", "outlast: "),
        ("status NO", "outlast: "),
        ("validate NO.yaml", "cannot be read"),
    ],
    ids=range(14),
)
def test_commands(run: Path, printed: Callable[..., str], arguments: str, expected: str) -> None:
    places = {"RUN": str(run), "ROOT": str(run.parent), "NO": f"no/such{HOSTILE}", "NO.yaml": f"{HOSTILE}.yaml"}
    parts = [places.get(part, part) for part in arguments.split()]
    output = printed(*parts)
    assert re.search(expected, output), output
    assert acting(output) == set()
    assert [line for line in output.splitlines() if line.startswith(FORGED.strip()[:5] + " 100")] == []
    assert "canary" not in output


def test_the_report(run: Path, printed: Callable[..., str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert acting(printed("report", str(run), "-o", str(page), "--verify")) == set()
    text = page.read_text()
    assert "canary" not in text
    assert "default-src 'none'" in text
    assert "\x1b" not in text
