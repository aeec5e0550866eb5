"""The commands before a run: starter files, all errors at once with their lines, and estimates of the run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.safetensors import header_bytes, parse_header
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.save.save_schedule import SaveCosts
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.config.run_file import SettingsError, load_run
from outlast.cluster.config.starter_files import EXAMPLES, template
from outlast.cluster.formatting import size
from outlast.cluster.preflight.estimate import describe, estimate_run
from outlast.cluster.preflight.validate import validate
from outlast.trainers.attempt import Assignment
from outlast.trainers.checks import dry_step_part
from outlast.trainers.config.task_table import TASKS
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.preparation.prepare import prepare
from tests.support.groups.worker_group import run_group, tiny_config
from tests.support.tasks.cases import CASES, Case, paragraphs, text_only

OUTLAST = str(Path(sys.executable).with_name("outlast"))
ROWS: dict[str, Case] = {case.task: case for case in CASES.values()} | {"causal-lm": Case("causal-lm", {}, text_only)}


def outlast(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([OUTLAST, *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    return done


def rows_of(task: str, folder: Path) -> None:
    """Write the rows that a template's run file names, beside it."""
    texts = list(paragraphs())[:40]
    (folder / "rows.jsonl").write_text("".join(json.dumps(ROWS[task].row(text)) + "\n" for text in texts))


@pytest.fixture
def body(tmp_path: Path, text_file: str) -> dict[str, Any]:
    return tiny_config("run", str(tmp_path / "runs"), text_file).model_dump(mode="json", exclude_defaults=True)


# -- init --------------------------------------------------------------------------------------------------------------


def test_every_task_has_a_template() -> None:
    assert set(EXAMPLES) == set(TASKS)


def test_no_starter_file_that_would_be_refused(tmp_path: Path) -> None:
    done = outlast("init", str(tmp_path / "run.toml"), code=2)
    assert not (tmp_path / "run.toml").exists()
    assert f"outlast init {tmp_path / 'run.yaml'}" in done.stderr


@pytest.mark.parametrize("task", TASKS)
def test_a_template_is_valid_unchanged(task: str, tmp_path: Path) -> None:
    """Both with its pretrained model and with its alternative, a new model."""
    path = tmp_path / "run.yaml"
    path.write_text(template(task))
    texts = [str(item) for item in validate(str(path))]
    assert len(texts) == 1
    assert "rows.jsonl does not exist" in texts[0], "nothing but the data is missing"
    rows_of(task, tmp_path)
    [few] = validate(str(path))
    assert few.finding.message.endswith("are held out: none of them for eval")  # 2 % of 40 rows
    data = tmp_path / "rows.jsonl"
    data.write_text(data.read_text() * 100)
    assert validate(str(path)) == []
    new = ["model.path=null", f"model.config={EXAMPLES[task].new}", "model.tokenizer={train_bpe: 4096}"]
    if task == "chat":  # a new tokenizer has no template
        [missing] = validate(str(path), new)
        assert "no chat template" in missing.finding.message
        new.append("data.chat_template='{{ messages[0].content }}'")
    assert validate(str(path), new) == []


def test_commented_settings_are_the_defaults(tmp_path: Path) -> None:
    """Uncommenting changes nothing, and every setting has its own name."""
    path = tmp_path / "run.yaml"
    for task in TASKS:
        text = template(task)
        path.write_text(text)
        config = load_run(str(path))[0]
        settings = [line for line in text.splitlines() if line.startswith("  # ") and ": " in line.split("#")[1]]
        offered = [line for line in settings if line.split()[1].rstrip(":") in _KEYS and line.split()[1].endswith(":")]
        known = [line for line in offered if not line.startswith(("  # config:", "  # tokenizer:", "  # steps:"))]
        assert len(known) > 12
        bare = "\n".join(line.replace("  # ", "  ", 1) if line in known else line for line in text.splitlines())
        path.write_text(bare)
        assert load_run(str(path))[0] == config


_KEYS = {name for block in RunConfig.model_fields.values() for name in getattr(block.annotation, "model_fields", {})}


def test_init_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    done = outlast("init", "--task", "chat", str(path))
    assert done.stdout.strip() == str(path)
    assert f"outlast validate {path}" in done.stderr
    assert path.read_text() == template("chat", str(path))
    assert "already exists; nothing was written" in outlast("init", str(path), code=2).stderr
    assert path.read_text() == template("chat", str(path))
    assert "did you mean 'chat'" in outlast("init", "--task", "chatt", str(tmp_path / "other.yaml"), code=2).stderr
    assert not (tmp_path / "other.yaml").exists()


def test_own_tasks_have_no_template() -> None:
    with pytest.raises(ConfigError, match="is a task of your own"):
        template("mine:Task")


# -- validate ----------------------------------------------------------------------------------------------------------

WRONG = """\
name: my run
seed: 7
lr: 1e-4
model:
  config: {model_type: gpt2, n_layer: 2}
  tokenizer:
    train_bep: 400
data:
  train: {text}
train:
  stepz: 10
  batch: many
  schedule: cosin
  eval_every: ${env:OUTLAST_NOT_SET}
checkpoint: {keep_last: 1, keep_best: 2}
"""
FOUND = [
    (1, "name", "'my run' is not usable", "change `name:`"),
    (3, "lr", "unknown key", "it belongs under train:"),
    (7, "model.tokenizer.train_bep", "unknown key", "did you mean 'train_bpe'?"),
    (11, "train.stepz", "unknown key", "did you mean 'steps'?"),
    (12, "train.batch", "must be a whole number (it is 'many')", ""),
    (13, "train.schedule", "must be 'cosine', ", "did you mean 'cosine'?"),
    (15, "checkpoint.keep_last", "greater than or equal to 2 (it is 1)", ""),
]


def test_all_errors_are_listed_with_their_lines(
    tmp_path: Path, text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(WRONG.replace("{text}", text_file))
    [missing] = validate(str(path))
    assert (missing.line, missing.finding.key) == (14, "train.eval_every")
    assert "OUTLAST_NOT_SET is not set" in missing.finding.message
    monkeypatch.setenv("OUTLAST_NOT_SET", "1 epoch")
    found = json.loads(outlast("validate", str(path), "--json", code=2).stdout)
    assert [(item["line"], item["key"]) for item in found] == [(line, key) for line, key, _, _ in FOUND]
    for item, (_, _, message, suggestion) in zip(found, FOUND, strict=True):
        assert message in item["message"]
        assert suggestion in item["suggestion"]
    shown = outlast("validate", str(path), code=2).stdout.splitlines()
    assert len(shown) == len(FOUND)
    assert f"{path}: line 11: train.stepz: unknown key; did you mean 'steps'?" in shown
    refused = outlast("train", str(path), code=2).stderr  # other commands report the same
    assert "line 11: train.stepz: unknown key; did you mean 'steps'?" in refused
    assert "line 15: checkpoint.keep_last" in refused


def test_errors_behind_an_unknown_key_are_listed_too(tmp_path: Path, body: dict[str, Any]) -> None:
    """The misspelt key, and the errors once it is read as the intended one."""
    body["train"]["step"] = body["train"].pop("steps")
    body["train"]["epochs"] = 2
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(body))
    texts = [str(item) for item in validate(str(path))]
    assert len(texts) == 2
    assert any("did you mean 'steps'" in line for line in texts)
    assert any("give steps or epochs, not both" in line for line in texts)


@pytest.mark.parametrize(
    ("text", "line", "texts"),
    [
        ("name: [", 1, "expected the node content"),
        ("name: a\nseed: 1\nseed: 2\n", 3, "duplicate key 'seed'"),
        ("name: a\n\tseed: 1\n", 2, "cannot start any token"),
        ("- a\n", None, "holds no settings"),
    ],
)
def test_invalid_run_files(tmp_path: Path, text: str, line: int | None, texts: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    [found] = validate(str(path))
    assert found.line == line
    assert texts in found.finding.message


@pytest.mark.parametrize("command", ["validate", "train", "status", "submit"])
def test_toml_is_no_longer_read(command: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "a"\n[model]\npath = "gpt2"\n')
    said = " ".join(outlast(command, str(path), code=2).stderr.split())
    assert "is TOML, which is no longer read" in said
    assert "write it as YAML" in said


def test_a_finding_in_an_option_names_the_option(tmp_path: Path, body: dict[str, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(body))
    [found] = validate(str(path), ["train.lr=fast"])
    assert str(found).startswith("-s train.lr=fast: train.lr: must be a number (it is 'fast')")
    with pytest.raises(SettingsError, match="are not valid"):
        load_run(str(path), ["train.lr=fast"])
    [found] = validate(str(path), ["train.micro_batch=3"])
    assert str(found).startswith("-s train.micro_batch=3: train: micro_batch (3) must divide batch (8)")


def test_a_similar_file_name_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "train-long.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        load_run(str(tmp_path / "train_long.yaml"))
    assert f"did you mean {tmp_path / 'train-long.yaml'}?" in caught.value.hint


def test_an_invalid_setting_hides_no_other_errors(tmp_path: Path, body: dict[str, Any]) -> None:
    """Valid blocks are still checked: the model, the data, the storage; checks of an invalid block are not run."""
    storage = tmp_path / "taken"
    storage.write_text("")
    path = tmp_path / "run.yaml"
    body = {**body, "name": "my run", "train": {"lr": "fast"}, "checkpoint": {"storage": str(storage)}}
    path.write_text(yaml.safe_dump({**body, "model": {**body["model"], "config": {"model_type": "gtp2"}}}))
    texts = "\n".join(str(item) for item in validate(str(path)))
    for part in ("name: ", "train.lr: ", "did you mean 'gpt2'?", "checkpoint.storage"):
        assert part in texts
    path.write_text(yaml.safe_dump({**body, "data": {"train": "/no/such.txt"}}))
    assert "/no/such.txt does not exist" in "\n".join(str(item) for item in validate(str(path)))
    [found] = validate(str(path), ["model.task=causal", "checkpoint.storage=null", "train=null"])[:1]
    assert "task" in str(found)


@pytest.mark.parametrize(
    ("change", "line_of", "texts"),
    [
        ({"data": {"train": "/no/such.txt"}}, "train:", "data file /no/such.txt does not exist"),
        ({"data": {"eval": "/no/held-out.txt"}}, "eval:", "/no/held-out.txt does not exist"),
        ({"model": {"config": {"model_type": "gpt2", "n_layers": 2}}}, "n_layers:", "did you mean 'n_layer'?"),
        ({"model": {"config": {"model_type": "gtp2"}}}, "model_type:", "did you mean 'gpt2'?"),
        (
            {"model": {"config": {"model_type": "t5"}, "task": "causal-lm"}},
            "task:",
            "causal-lm is not supported for t5 models",
        ),
        ({"model": {"class": "nowhere:Model"}}, "class:", "cannot be imported"),
        ({"model": {"path": "/no/model", "config": None, "tokenizer": None}}, "path:", "/no/model does not exist"),
        ({"train": {"optimizer": "adamv"}}, None, "did you mean 'adam'?"),
        ({"scale": {"workers": 9}}, None, "9 workers, but a batch of 8"),
        (
            {"checkpoint": {"keep_best": 1, "metric": "accuracy"}, "data": {"eval": "9%"}},
            "metric:",
            "checkpoint.metric 'accuracy' is not measured by task causal-lm",
        ),
        ({"checkpoint": {"storage": "/proc/version/runs"}}, "storage:", "a file is where a directory is needed"),
    ],
)
def test_errors_found_without_training(
    tmp_path: Path, body: dict[str, Any], change: dict[str, Any], line_of: str | None, texts: str
) -> None:
    for block, values in change.items():
        body[block] = {**body.get(block, {}), **values}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(body, default_flow_style=False))
    found = validate(str(path))
    assert len(found) == 1, [str(item) for item in found]
    assert texts in str(found[0])
    if line_of is not None:
        assert found[0].line is not None
        assert line_of in path.read_text().splitlines()[found[0].line - 1]
    assert not (tmp_path / "runs").exists(), "it writes nothing"


def test_missing_columns_are_found(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(template("sequence-classification"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "kind": 1, "other": 2}\n')
    [found] = validate(str(path))
    assert "has no column 'label'; it has text, kind, other" in found.finding.message
    assert "-s data.label=" in found.finding.suggestion
    (tmp_path / "rows.jsonl").write_text('{"text": 7, "label": 1}\n')
    [found] = validate(str(path))
    assert "the first row of data.train cannot be used" in found.finding.message


def test_the_deep_check_reads_every_row(tmp_path: Path, body: dict[str, Any]) -> None:
    rows = [json.dumps({"text": text}) for text in list(paragraphs())[:200]]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, '{"text": 7}']))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**body, "data": {**body["data"], "train": "rows.jsonl"}}))
    assert validate(str(path)) == []
    [found] = validate(str(path), deep=True)
    assert "rows.jsonl" in found.finding.message
    assert "201" in found.finding.message, "it names the row"
    assert validate(str(path), ["data.max_bad_rows=1"], deep=True) == []


def test_the_deep_check_notes_what_is_no_error(
    tmp_path: Path, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, notes = tmp_path / "run.yaml", list[str]()
    xlnet = {"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "attn_type": "uni"}
    path.write_text(yaml.safe_dump({**body, "model": {**body["model"], "config": xlnet}}))
    assert validate(str(path), deep=True, note=notes.append) == []
    *found, unused = notes
    assert found[0] == "task causal-lm, columns: text"
    assert "gives no gradient to 5 trained parameters: transformer.mask_emb, transformer.layer.0" in unused
    monkeypatch.setattr(dry_step_part, "free_bytes", lambda: 0)
    assert validate(str(path), deep=True, note=notes.append) == []
    assert notes[-1].startswith("the first step was not tried in advance: a model of")


def test_an_existing_run_with_other_settings(
    assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    assignment = assign("begun", steps=3)
    assert run_group(assignment, storage, 1)[0].outcome is Outcome.DONE
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(dict(assignment.declared)))
    assert validate(str(path)) == []
    [found] = validate(str(path), ["train.lr=0.5"])
    assert "train.lr was 0.001, is 0.5" in found.finding.message
    assert "train will fail" not in outlast("plan", str(path)).stderr
    assert "train.lr was 0.001, is 0.5" in outlast("plan", str(path), "-s", "train.lr=0.5").stderr


# -- plan --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("ddp", {}),
        ("sgd", {"train": {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}}}),
        ("cut", {"checkpoint": {"max_shard_size": "60KB", "overlap": True}}),
        ("elastic", {"exactness": "elastic"}),
    ],
)
def test_a_plan_matches_the_run(
    name: str, sections: dict[str, Any], assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    """Parameters, steps and the checkpoint's size against a real run of two workers."""
    assignment = assign(f"planned-{name}", sections=sections)
    config = RunConfig.model_validate({**assignment.declared, "scale": {"workers": 2}})
    found = estimate_run(config)
    assert run_group(assignment, storage, 2)[0].outcome is Outcome.DONE
    newest = read_catalog(storage, config.name).accepted[0]
    assert newest.ref.step == found.walk.num_steps == 10
    assert found.walk.num_samples == prepare(config, storage).num_samples
    assert found.walk.tokens == 10 * 8 * 16
    directory = f"{config.name}/attempts/{newest.ref.attempt}/checkpoint-10"
    num_parameters = 0
    for entry in newest.files:
        if entry.path.endswith(".safetensors") and "/" not in entry.path:
            data = read_bytes(storage, f"{directory}/{entry.path}")
            places, _ = parse_header(data[: header_bytes(data)], len(data))
            num_parameters += sum(spec.num_bytes // 4 for spec, _ in places.values())
    assert found.size.num_parameters == found.size.num_trained == num_parameters
    assert newest.num_bytes == pytest.approx(found.size.checkpoint_bytes, rel=0.01)
    real = {entry.path: entry.num_bytes for entry in newest.files}
    assert set(found.size.files) <= set(real)
    for path, num_bytes in found.size.files.items():
        assert real[path] == pytest.approx(num_bytes, abs=64), path
    memory, state_bytes = found.size.memory, 2 if name != "sgd" else 1
    assert memory.weights == 4 * num_parameters
    assert memory.optimizer == pytest.approx(state_bytes * memory.weights, rel=0.01)
    assert memory.gradients > memory.weights if name == "elastic" else memory.gradients == memory.weights
    assert memory.snapshot == (found.size.share_bytes if name == "cut" else 0)


@pytest.mark.faults
def test_a_plan_shows_the_costs_behind_its_interval(tmp_path: Path, body: dict[str, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**body, "checkpoint": {**body["checkpoint"], "every": "auto", "overlap": True}}))
    found = json.loads(outlast("plan", str(path), "--json").stdout)
    saving = found["saving"]
    costs = SaveCosts(saving["blocked_s"], saving["commit_s"], saving["restart_s"], saving["between_failures_s"])
    assert saving["auto_s"] == costs.interval_s
    assert saving["between_failures_s"] == pytest.approx(4 * 3600)
    assert saving["commit_s"] > found["size"]["checkpoint_bytes"] / saving["write_speed"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".data"], "the measurement's files are deleted"
    assert found["size"]["memory"]["snapshot"] > found["size"]["memory"]["weights"]
    text = outlast("plan", str(path)).stdout
    assert "10 steps" in text
    assert "activations are not counted" in text
    assert "every: auto would save after 60 s, then every" in text


def test_a_plan_compares_what_is_needed_with_what_is_free(body: dict[str, Any]) -> None:
    found = estimate_run(RunConfig.model_validate(body))
    assert found.free_bytes is not None
    assert found.shortage is None
    needed = (found.kept + 1) * found.size.checkpoint_bytes + 4 * found.size.num_parameters
    small = replace(found, free_bytes=needed - 1)
    assert small.shortage is not None
    assert f"need {size(needed)}" in small.shortage
    assert "checkpoint.keep_last" in small.shortage
    assert replace(small, held_bytes=1).shortage is None  # its own checkpoints are replaced
    assert replace(small, free_bytes=None).shortage is None
    assert any(f"the storage has {size(needed - 1)} free" in line for line in describe(small))


def test_a_plan_of_an_adapter(tmp_path: Path, text_file: str) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from outlast.trainers.data.tokenizer import train_bpe

    tokenizer = train_bpe(iter(Path(text_file).read_text().splitlines()), 400)
    tokenizer.inner.save_pretrained(tmp_path / "base")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(AutoTokenizer.from_pretrained(tmp_path / "base")), **size))
    model.save_pretrained(tmp_path / "base")
    whole = tiny_config("run", str(tmp_path / "runs"), text_file).model_dump(mode="json", exclude_defaults=True)
    whole["model"] = {"path": str(tmp_path / "base"), "lora": {"r": 4}}
    found = estimate_run(RunConfig.model_validate(whole))
    assert 0 < found.size.num_trained < found.size.num_parameters / 10
    assert set(found.size.files) >= {"adapter_model.safetensors", "adapter_config.json"}
    assert found.size.files["adapter_model.safetensors"] == pytest.approx(4 * found.size.num_trained, abs=3000)
    assert any("of them trained" in line for line in describe(found))
