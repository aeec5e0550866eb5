"""What data says never acts on a terminal and never forges a line, whoever prints it."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.escaping import escaped
from outlast.cluster import output
from outlast.cluster.cli import main as command_line
from outlast.cluster.safe_console import SafeConsole
from tests.test_layout import ROOT, sources

ACTING = "\x1b[2J\x1b]8;;http://evil\x07 \x9b31m \u202e \x00 \r\b \u2028 \x85 \ud800"
HOSTILE = f"a{ACTING}\noutlast: all is well"
READABLE = "Überraschung, 学习, می‌خواهم, 👩‍🔬, naïve"


def acting(text: str) -> set[str]:
    """Characters of an output that would act on a terminal."""
    return {letter for letter in text.replace("\n", "") if escaped(letter) != letter}


def test_escaping() -> None:
    assert escaped(READABLE) == READABLE
    assert acting(escaped(HOSTILE)) == set()
    assert escaped("a\x1b\x9b\n\u202e") == "a\\x1b\\x9b\\n\\u202e"
    assert acting(HOSTILE) >= {"\x1b", "\x9b", "\u202e", "\r", "\x00", "\u2028", "\x85"}, "the check sees them"


def test_a_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_line(HOSTILE.replace("\ud800", ""))
    output.print_line(READABLE, to_stderr=True)
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    assert acting(printed.out) == set()
    assert printed.err == f"{READABLE}\n"


def test_a_text_keeps_its_lines_and_forges_none(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_text("outlast: no\n  line 3: a\noutlast: all is well\x1b[0m", indent="  ")
    assert capsys.readouterr().out == "outlast: no\n  line 3: a\n  outlast: all is well\\x1b[0m\n"


def test_a_log_keeps_its_lines_without_what_acts(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_log("\x1b[36m(pid=1)\x1b[0m a\tb\r\n10%\r20%\x1b[2J\nhalf")
    output.print_log(" a line\n")
    assert capsys.readouterr().out == "(pid=1) a\tb\n10%\n20%\\x1b[2J\nhalf a line\n"


@pytest.mark.parametrize("ensure_ascii", [False, True])
def test_json_stays_json(ensure_ascii: bool, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"text": HOSTILE.replace("\ud800", "") + READABLE + "\U000e0001"}
    output.print_json(body, ensure_ascii=ensure_ascii)
    printed = capsys.readouterr().out
    assert json.loads(printed) == body
    assert acting(printed) == set()
    assert ("学习" in printed) is not ensure_ascii


def test_credentials_are_not_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-1")
    output.print_line("canary-1")
    output.print_text("a\ncanary-1")
    output.print_log("canary-1\n")
    output.print_json({"a": "canary-1"})
    output.make_console().print("canary-1")
    printed = capsys.readouterr().out
    assert printed.count("<MY_TOKEN>") == 5
    assert "canary" not in printed


def test_data_on_a_console_is_neither_markup_nor_control() -> None:
    console = SafeConsole()
    console.file = file = io.StringIO()
    table = Table()
    table.add_column(f"c{ACTING}")
    table.add_row(f"[bold]r[/bold]{ACTING}")
    for item in (f"[link=http://evil]a[/link] :smile: {ACTING}", Text(f"t{ACTING}"), table):
        console.print(item)
    printed = file.getvalue()
    assert "[link=http://evil]a[/link] :smile:" in printed
    assert "[bold]r[/bold]" in printed.replace("\n", "")
    assert acting(printed) == set()


def test_an_error_at_the_end_of_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise ConfigError(HOSTILE.replace("\ud800", ""), hint=f"try\n  → that{ACTING[:8]}")

    monkeypatch.setattr(command_line, "app", fail)
    monkeypatch.setattr("sys.argv", ["outlast", "--debug"])
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert acting(printed) == set()
    assert len([line for line in printed.splitlines() if line.startswith("outlast:")]) == 1
    assert "  outlast: all is well" in printed.splitlines()


def test_nothing_is_printed_past_the_escaper() -> None:
    """Every print of the commands stands in `output.py`; a console of rich is made in one place.

    An own loop has no command: what its end says of a save passes both filters in `in_flight.py`.
    """

    def prints(path: Path) -> list[int]:
        names = ("print", "sys.stdout.write", "sys.stderr.write", "Console", "traceback.print_exc", "typer.echo")
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        return [node.lineno for node in calls if ast.unparse(node.func) in names]

    found = {
        str(path.relative_to(ROOT)): lines
        for room in ("checkpointing", "trainers", "cluster")
        for path in sources(room)
        if (lines := prints(path))
    }
    assert len(found.pop("checkpointing/save/in_flight.py")) == 1
    assert "print(escaped(redact(" in (ROOT / "checkpointing/save/in_flight.py").read_text()
    assert found == {}
    assert prints(ROOT / "tests/support/command.py"), "the scan sees a print"
