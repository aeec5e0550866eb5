"""README.md, docs/ and k8s/README.md: every block of code runs or is marked, and every link resolves.

A block's language is followed by the reason why it does not run here (`MARKS`), or by the test that runs it. `text` is
output. A page with files of its own (`# run.yaml` is a block's first line) starts in an empty directory; the others
start in a directory with the README's finished run. About 90 s, and some minutes more with the slow ones.
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

from outlast.cluster.config.run_config import RunConfig
from outlast.trainers.data.tokenizer import train_bpe
from tests.docs.test_reference import load_reference
from tests.support.command import Command

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md")), ROOT / "k8s/README.md"]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks/RESULTS.md"]
MARKS = {
    "cluster": "a Ray or Kubernetes cluster",
    "hub": "an account and the network",
    "ci": "`.ci/run` does it, or one of the tests that it runs",
    "slow": "`make test-faults` runs it",
    "before": "code that a reader migrates from; its imports are tested",
}
STARTS = {"console": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
#: Output that a tutorial must have printed, besides exit code 0: it was killed, and it recovered.
PRINTS = {
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
        """Name of the file that the block is saved as."""
        found = re.match(r"# ([\w.-]+\.(?:py|yaml))\n", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[str]:
        """Lines of a console block, without comments."""
        return [line for raw in self.text.splitlines() if (line := re.split(r"\s+# ", raw)[0].strip())]

    @property
    def is_verbs(self) -> bool:
        """Whether all lines are commands of outlast, which can be forked with their imports done."""
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


# -- blocks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_runs_or_is_marked(block: Block) -> None:
    assert block.language in LANGUAGES, "use `console`, `python`, `yaml`, `json`, or `text` for output"
    if block.mark.startswith("tests/"):
        assert block.page.name in (ROOT / block.mark).read_text(), f"{block.mark} does not name this page"
    else:
        assert block.mark in ("", *MARKS), f"unknown mark: {block.mark}"
    if block.language == "python":
        compile(block.text, str(block), "exec")
    if block.language == "json":
        json.loads(block.text)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.mark == "before"], ids=str)
def test_imports_of_code_to_migrate_from(block: Block) -> None:
    found = [node for node in ast.parse(block.text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert found
    exec(compile(ast.Module([*found], []), str(block), "exec"), {})


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "console"], ids=str)
def test_commands_have_verbs_and_options_that_exist(block: Block) -> None:
    """Includes commands that need a cluster."""
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


def test_settings_to_migrate_from_exist() -> None:
    """First column of each table of settings."""
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


# -- links -------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Relative links and pictures of a page."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    return [target for target in found if not re.match(r"https?://", target)]


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=path_of)
def test_links_resolve(page: Path) -> None:
    for target in links(page):
        place, _, anchor = target.partition("#")
        path = page.parent / place if place else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_page_is_in_the_index() -> None:
    index = DOCS / "README.md"
    listed = {(DOCS / target).resolve() for target in links(index)}
    assert [path_of(page) for page in DOCS.rglob("*.md") if page != index and page.resolve() not in listed] == []
    assert "docs/README.md" in links(README)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=path_of)
def test_files_and_modules_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    rooms = "checkpointing|trainers|cluster"
    files = re.findall(rf"`((?:{rooms}|tests|benchmarks|examples|k8s)/[\w/.-]+\.\w+)`", text)
    modules = re.findall(rf"`outlast\.((?:{rooms})(?:\.[a-z_]+)*)`", text)
    assert [name for name in files if not (ROOT / name).is_file()] == []
    places = [ROOT / name.replace(".", "/") for name in modules]
    assert [place for place in places if not place.is_dir() and not place.with_suffix(".py").is_file()] == []


# -- execution ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command() -> Iterator[Command]:
    command = Command()
    yield command
    command.close()


def walk(page: Path, folder: Path, command: Command, *, slow: bool = False) -> str:
    """Run the blocks of a page in `folder`, from top to bottom. Returns the output."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path}
    output = ""
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
            output += done.stdout + done.stderr
    return output


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """Directory with the README's finished run."""
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
    """Directory in which a page starts."""
    if any(block.file for block in blocks_of(page)):
        return folder
    return Path(shutil.copytree(world, folder / "here", symlinks=True))


@pytest.mark.ray
@pytest.mark.parametrize("page", [page for page in PAGES[1:] if runs(page, slow=False)], ids=path_of)
def test_a_page_runs(page: Path, world: Path, tmp_path: Path, command: Command) -> None:
    output = walk(page, ready(page, world, tmp_path), command)
    if not any(block.mark == "slow" for block in blocks_of(page)):
        assert [pattern for pattern in PRINTS.get(path_of(page), ()) if not re.search(pattern, output)] == [], output


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
def test_a_page_with_slow_blocks_runs(page: Path, world: Path, tmp_path: Path, command: Command) -> None:
    output = walk(page, ready(page, world, tmp_path), command, slow=True)
    assert [pattern for pattern in PRINTS.get(path_of(page), ()) if not re.search(pattern, output)] == [], output
