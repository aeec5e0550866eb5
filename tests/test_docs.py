"""README.md and docs/: every command and every block of code runs, or says why not; every link leads somewhere.

A block's language is followed by what keeps it from being run here (`MARKS`), or by the test that runs it. `text` is
output. A page that writes files of its own (`# run.yaml` is a block's first line) begins in an empty directory; the
others begin where the README's own run has been. About 90 s, and some minutes more with the slow ones.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import yaml

from outlast.cluster.config import RunConfig
from outlast.trainers.models import train_bpe
from tests.command import Command
from tests.test_reference import load_reference

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
MARKS = {
    "cluster": "a Ray or Kubernetes cluster",
    "hub": "an account and the network",
    "ci": "`.ci/run` does it, or one of the tests that it runs",
    "slow": "`make test-faults` runs it",
    "before": "what a reader had; its imports are tried",
}
STARTS = {"console": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
#: What a tutorial must have printed in the end, beside having ended well: it was killed, and it came back.
SAYS = {
    "docs/tutorials/laptop.md": ("resumed from", "attempts: 2", " equal, 0 changed, 0 added, 0 removed"),
    "docs/tutorials/own-loop.md": (
        r"from step 0\n(.*\n)*from step [1-9]\d*\ndone",
        " equal, 0 changed, 0 added, 0 removed",
    ),
    "docs/tutorials/hf-trainer.md": (r"from None\n(.*\n)*from \S+/checkpoint-[1-9]\d*\n(.*\n)*done at step 40",),
    "docs/how-to/migrate-from-ray-train.md": ("attempts: 2",),
}
LANGUAGES = {"console", "python", "yaml", "json", "text"}


def path_of(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{path_of(self.page)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that a reader is to make of it."""
        found = re.match(r"# ([\w.-]+\.(?:py|yaml))\n", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[str]:
        """The lines of a console block, without comments."""
        return [line for raw in self.text.splitlines() if (line := re.split(r"\s+# ", raw)[0].strip())]

    @property
    def is_verbs(self) -> bool:
        """Nothing but verbs of outlast, one a line: those can be forked with their imports done."""
        plain = re.compile(r"outlast [^|&;$<>\\]*")
        return self.language == "console" and all(plain.fullmatch(line) for line in self.commands)


def blocks_of(page: Path) -> Iterator[Block]:
    opened: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            if opened:
                opened[2].append(line)
        elif opened is None:
            opened = number, line[3:].strip(), []
        else:
            language, _, mark = opened[1].partition(" ")
            yield Block(page, opened[0], language, mark, "\n".join(opened[2]) + "\n")
            opened = None
    assert opened is None, f"{path_of(page)}:{opened}: a block without an end"


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def runs(page: Path, *, slow: bool) -> bool:
    marks = {"", "slow"} if slow else {""}
    return any(block.language in ("console", "python") and block.mark in marks for block in blocks_of(page))


# -- every block says what it is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_runs_or_says_why_not(block: Block) -> None:
    assert block.language in LANGUAGES, "say `console`, `python`, `yaml`, or `text` for what is printed"
    if block.mark.startswith("tests/"):
        assert block.page.name in (ROOT / block.mark).read_text(), f"{block.mark} does not know this page"
    else:
        assert block.mark in ("", *MARKS), "what keeps it from being run?"
    if block.language == "python":
        compile(block.text, str(block), "exec")
    if block.language == "json":
        json.loads(block.text)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark == "before"], ids=str)
def test_what_a_reader_had_can_be_imported(block: Block) -> None:
    found = [node for node in ast.parse(block.text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert found
    exec(compile(ast.Module([*found], []), str(block), "exec"), {})


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "console"], ids=str)
def test_commands_have_verbs_and_options_that_exist(block: Block) -> None:
    """Those too that need a cluster."""
    verbs = dict(load_reference().verbs())
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in block.commands:
        for part in re.split(r" \| | && ", command):
            words = shlex.split(part)
            if words[0] == "make":
                assert words[1] in targets
            if words[0] != "outlast":
                continue
            verb = next(" ".join(words[:n]) for n in (3, 2, 1) if " ".join(words[:n]) in verbs or n == 1)
            known = {flag for item in verbs[verb].params for flag in (*item.opts, *item.secondary_opts)}
            assert [word for word in words if word.startswith("-") and word != "-" and word not in known] == []


# -- settings ----------------------------------------------------------------------------------------------------------


def readme_run() -> dict[str, Any]:
    [text] = [block.text for block in BLOCKS if block.page == README and block.language == "yaml"]
    return yaml.safe_load(text)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "yaml"], ids=str)
def test_yaml_is_a_run_file_or_a_part_of_one(block: Block) -> None:
    body = yaml.safe_load(block.text)
    if "name" not in body:
        whole = readme_run()
        for key, value in body.items():
            whole[key] = value if key == "model" else {**whole.get(key, {}), **value}
        if "steps" in body.get("train", {}):
            del whole["train"]["epochs"]
        body = whole
    RunConfig.model_validate(body)


@pytest.mark.parametrize("page", PAGES, ids=path_of)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    known = {name for name, *_ in load_reference().settings(RunConfig)}
    named = re.findall(r"`((?:model|data|train|scale|checkpoint|failure|track)\.[a-z_.]+)", page.read_text())
    files = (".py", ".json", ".jsonl", ".yaml", ".safetensors")
    assert [name for name in named if not name.endswith(files) and name.rstrip(".") not in known] == []


def test_settings_that_one_had_exist() -> None:
    """The first column of each table of settings."""
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from transformers import TrainingArguments

    def column(page: str) -> set[str]:
        table = (DOCS / "how-to" / page).read_text().split("|---|---|---|\n")[1].split("\n\n")[0]
        return {name for row in table.splitlines() for name in re.findall(r"`([\w.]+)`", row.split(" | ")[0])}

    trainer = {field.name for field in dataclasses.fields(TrainingArguments)}
    ray = {
        f"{block.__name__}.{field.name}"
        for block in (ScalingConfig, RunConfig, FailureConfig, CheckpointConfig)
        for field in dataclasses.fields(block)
    }
    assert column("migrate-from-hf-trainer.md") - trainer == set()
    assert column("migrate-from-ray-train.md") - ray == set()


# -- links and figures -------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=path_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        place, _, anchor = target.partition("#")
        if re.match(r"https?://", place):
            continue
        path = page.parent / place if place else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_page_is_linked_from_the_readme() -> None:
    readme = README.read_text()
    assert [path_of(page) for page in PAGES[1:] if f"({path_of(page)})" not in readme] == []


def test_the_numbers_of_cases_are_the_readmes() -> None:
    def rows(page: Path) -> list[list[str]]:
        table = page.read_text().split("| what happens |")[1].split("\n\n")[0]
        return [row.strip("| ").split(" | ") for row in table.splitlines()[2:]]

    readme, whole = rows(README), rows(DOCS / "explanation/guarantees-and-limits.md")
    assert [(row[0], row[-1]) for row in readme] == [(row[0], row[1]) for row in whole]


# -- running them ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    command = Command()
    yield command
    command.close()


def walk(page: Path, folder: Path, command: Command, *, slow: bool = False) -> str:
    """Does in `folder` what a reader of the page does, from top to bottom. Returns what was printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "disabled"}
    said = ""
    for block in blocks_of(page):
        if block.file and not block.mark:
            (folder / block.file).write_text(block.text)
            continue
        if block.language not in STARTS or block.mark not in ("", *(["slow"] if slow else [])):
            continue
        if block.is_verbs and not block.mark:
            ended = [command(*shlex.split(line)[1:], cwd=folder) for line in block.commands]
        else:
            whole = [*STARTS[block.language], block.text]
            ended = [subprocess.run(whole, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)]
        for done in ended:
            assert done.returncode == 0, f"{block}: {done.args}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            said += done.stdout + done.stderr
    return said


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A directory in which the README's run has been."""
    import transformers

    folder = tmp_path_factory.mktemp("docs")
    lines = [line for text in topics.values() for line in text.splitlines() if len(line) > 60][:2000]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line[:30]}) + "\n" for line in lines[:2]))
    tokenizer = train_bpe(iter(lines), 300)
    ends = {f"{end}_token_id": tokenizer.inner.eos_token_id for end in ("bos", "eos")}
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=512, vocab_size=300, **ends)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "my-gpt2")
    tokenizer.inner.save_pretrained(folder / "my-gpt2")
    walk(README, folder, command)
    return folder


def ready(page: Path, world: Path, folder: Path) -> Path:
    """Where a reader of the page begins."""
    if any(block.file for block in blocks_of(page)):
        return folder
    return Path(shutil.copytree(world, folder / "here", symlinks=True))


@pytest.mark.ray
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if runs(page, slow=False)], ids=path_of)
def test_a_page_does_what_it_says(page: Path, world: Path, tmp_path: Path, command: Command) -> None:
    said = walk(page, ready(page, world, tmp_path), command)
    if not any(block.mark == "slow" for block in blocks_of(page)):
        assert [pattern for pattern in SAYS.get(path_of(page), ()) if not re.search(pattern, said)] == [], said


@pytest.mark.faults  # some minutes
@pytest.mark.ray
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=path_of(page), marks=pytest.mark.slice if page.stem == "laptop" else ())
        for page in PAGES
        if any(block.mark == "slow" for block in blocks_of(page))
    ],
)
def test_a_page_with_slow_blocks_does_what_it_says(page: Path, world: Path, tmp_path: Path, command: Command) -> None:
    said = walk(page, ready(page, world, tmp_path), command, slow=True)
    assert [pattern for pattern in SAYS.get(path_of(page), ()) if not re.search(pattern, said)] == [], said
