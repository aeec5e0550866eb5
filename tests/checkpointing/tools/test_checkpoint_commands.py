"""The `checkpoints` verbs that compare, keep and export, on small GPT-2 and BERT runs; and docs/how-to/export.md,
word by word.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.tools.diff import ChangeKind, compare_tensors
from outlast.checkpointing.tools.export import (
    Content,
    Dtype,
    converted,
    export_directory,
    read_content,
    slow_tokenizer_files,
)
from outlast.checkpointing.tools.query import resolve_checkpoint
from outlast.cluster.cli.main import main
from outlast.trainers.data.tokenizer import Tokenizer, tokenizer_files, train_bpe
from outlast.trainers.models.torch_save_export import write_state_dict
from tests.support.decoded_safetensors import decode

PAGE = Path(__file__).parents[3] / "docs/how-to/export.md"
TEXT = "the worker was lost, and the run went on from the newest checkpoint that is proven whole"


@dataclass(frozen=True)
class Said:
    """What a command printed."""

    out: str
    err: str


Outlast = Callable[..., Said]


@pytest.fixture
def outlast(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Outlast]:
    """Runs a command in this process, from the command line to the exit code."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path, code: int = 0) -> Said:
        monkeypatch.setattr(sys, "argv", ["outlast", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = Said(*capsys.readouterr())
        assert (ended.value.code or 0) == code, said.err
        return said

    yield run
    signal.signal(signal.SIGTERM, before)


# -- runs --------------------------------------------------------------------------------------------------------------


def small_files(model: Any, tokenizer: Tokenizer, folder: Path) -> dict[str, bytes]:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return {
        "config.json": (folder / "config.json").read_bytes(),
        **tokenizer_files(tokenizer),
        "trainer_state.json": b"{}",
    }


def save_run(storage: LocalStorage, name: str, model: nn.Module, files: dict[str, bytes], steps: Sequence[int]) -> None:
    """A run that saved at these steps, its best one (by eval_loss) the first; the last is published as its model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    checkpointer = Checkpointer(
        storage,
        name,
        declaration={"mathematics": {"train": {"lr": 0.01, "of": name}}},
        notes={"settings": {"checkpoint": {"keep_best": 1}}},
        files=files,
        retention=Retention(9),
    )
    checkpointer.resume(model, optimizer)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        assert checkpointer.save(step, model, optimizer, {"step": step}, metrics={"eval_loss": step / 100})
    checkpointer.finish(checkpointer.accepted[0].ref, steps[-1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/my-run (GPT-2), runs/my-other (GPT-2 with one more layer) and runs/my-bert."""
    folder = tmp_path_factory.mktemp("made")
    storage = LocalStorage(folder / "runs")
    torch.manual_seed(0)
    bpe = train_bpe(iter([TEXT] * 4), 300)
    for name, num_layers in (("my-run", 1), ("my-other", 2)):
        config = transformers.GPT2Config(
            vocab_size=len(bpe), n_positions=64, n_embd=16, n_layer=num_layers, n_head=2, bos_token_id=0, eos_token_id=0
        )
        gpt2 = transformers.GPT2LMHeadModel(config)
        save_run(storage, name, gpt2, small_files(gpt2, bpe, folder), [200, 400, 600, 800, 1000])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(TEXT.replace(",", "").split()), "##s", ","]
    wordpiece = Tokenizer(transformers.BertTokenizer({word: number for number, word in enumerate(words)}))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    bert = transformers.BertForSequenceClassification(config)
    save_run(storage, "my-bert", bert, small_files(bert, wordpiece, folder), [200, 400])
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to work in."""
    shutil.copytree(made / "runs", tmp_path / "runs", symlinks=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checkpoint(run: str, step: int) -> Path:
    [path] = Path("runs", run, "attempts").glob(f"*/checkpoint-{step}")
    return path


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return decode(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8))


# -- docs/how-to/export.md --------------------------------------------------------------------------------------------


def test_the_page(here: Path, outlast: Outlast) -> None:
    """Each command of it runs as it stands, then each block of Python, and what it loads is the checkpoint."""
    commands = [re.split(r" {3,}", line)[0] for line in PAGE.read_text().splitlines() if line.startswith("outlast ")]
    assert {command.split()[2] for command in commands} == {"diff", "pin", "unpin", "prune", "export"}
    best = {run: checkpoint(run, 200) for run in ("my-run", "my-bert")}
    kept = {run: weights_in(path / "model.safetensors") for run, path in best.items()}
    for run, path in best.items():
        shutil.copytree(path, here / f"copy-of-{run}")
    for command in commands:
        outlast(*shlex.split(command)[1:])
    rows = json.loads(outlast("checkpoints", "ls", "runs/my-run", "--json").out)
    assert [row["step"] for row in rows] == [1000, 800, 400, 200], "200 is the best, 400 the last of its 400 steps"
    outlast("checkpoints", "verify", "runs/my-run")

    blocks = re.findall(r"```python tests/\S+\n(.*?)```", PAGE.read_text(), re.DOTALL)
    autos = [transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification]
    for block, run, auto in zip(blocks, kept, autos, strict=True):
        loaded: dict[str, Any] = {}
        exec(block, loaded)
        state = loaded["model"].state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in kept[run].items())
        tokenizer = transformers.AutoTokenizer.from_pretrained(here / f"copy-of-{run}")
        ids = loaded["tokenizer"](TEXT, return_tensors="pt")["input_ids"]
        assert torch.equal(ids, tokenizer(TEXT, return_tensors="pt")["input_ids"])
        model = auto.from_pretrained(here / f"copy-of-{run}")
        assert torch.allclose(loaded["model"](ids).logits, model(ids).logits, atol=1e-6)

    plain = transformers.AutoModelForCausalLM.from_pretrained("my-model")
    assert all(torch.equal(plain.state_dict()[name], tensor) for name, tensor in kept["my-run"].items())
    assert transformers.AutoModelForCausalLM.from_pretrained("my-model-bf16").dtype is torch.bfloat16
    assert Path("old-style/vocab.json").is_file()


# -- diff --------------------------------------------------------------------------------------------------------------


def test_diff_within_a_run(here: Path, outlast: Outlast) -> None:
    ours, theirs = (weights_in(checkpoint("my-run", step) / "model.safetensors") for step in (200, 400))
    body = json.loads(outlast("checkpoints", "diff", "runs/my-run", "200", "400", "--json").out)
    assert [body["a"], body["b"]] == [str(checkpoint("my-run", step).absolute()) for step in (200, 400)]
    assert body["settings"] == {}
    assert [item["name"] for item in body["tensors"]] == sorted(ours)
    for item in body["tensors"]:
        a, b = (side[item["name"]].double() for side in (ours, theirs))
        assert item["change"] == "changed"
        assert item["norms"] == pytest.approx([a.norm().item(), b.norm().item()])
        assert item["distance"] == pytest.approx((b - a).norm().item())
        assert item["largest"] == pytest.approx((b - a).abs().max().item())
        assert item["shapes"] == [list(a.shape)] * 2
    [attempt] = Path("runs/my-run/attempts").iterdir()
    same = outlast("checkpoints", "diff", "my-run", "best", f"200@{attempt.name}", "--optimizer").out
    assert "the settings are the same" in same
    assert f"tensors: {3 * len(ours) + len(ours)} equal, 0 changed" in same, "weights, two moments and a counter each"


def test_diff_across_runs(here: Path, outlast: Outlast) -> None:
    said = outlast("checkpoints", "diff", "runs/my-run", "best", "model", "--with", "runs/my-other").out
    assert "\ntrain.of: 'my-run' → 'my-other'" in said
    assert "train.lr" not in said
    assert re.search(r"tensors: 0 equal, 16 changed, 12 added, 0 removed", said)
    shutil.rmtree(checkpoint("my-other", 1000))
    said = outlast("checkpoints", "diff", "runs/my-run", "best", "model", "--with", "runs/my-other").out
    assert "the settings are not recorded" in said
    assert re.search(r"^added .* transformer\.h\.1\.attn\.c_attn\.weight float32 \[16, 48\]$", said, re.MULTILINE)


NAN = math.nan


@pytest.mark.parametrize(
    ("first", "second", "change", "distance", "largest"),
    [
        (torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0]), ChangeKind.EQUAL, 0.0, 0.0),
        (torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.0]), ChangeKind.CHANGED, 5.0, 4.0),
        (torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), ChangeKind.CHANGED, 0.0, 0.0),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), ChangeKind.CHANGED, None, None),
        (torch.tensor(1.5), torch.tensor(1.0), ChangeKind.CHANGED, 0.5, 0.5),
        (torch.zeros(0, 3), torch.zeros(0, 3), ChangeKind.EQUAL, 0.0, 0.0),
        (torch.tensor([NAN]), torch.tensor([NAN]), ChangeKind.EQUAL, NAN, NAN),
        (torch.tensor([0.0, NAN, 0.0]), torch.tensor([0.0, 1.0, 9.0]), ChangeKind.CHANGED, NAN, NAN),
        (torch.tensor([0.0]), torch.tensor([-0.0]), ChangeKind.CHANGED, 0.0, 0.0),
        (torch.tensor([True, False]), torch.tensor([True, True]), ChangeKind.CHANGED, 1.0, 1.0),
        (None, torch.tensor([1.0]), ChangeKind.ADDED, None, None),
        (torch.tensor([1.0]), None, ChangeKind.REMOVED, None, None),
    ],
)
def test_tensors_side_by_side(
    first: torch.Tensor | None,
    second: torch.Tensor | None,
    change: ChangeKind,
    distance: float | None,
    largest: float | None,
) -> None:
    found = compare_tensors("name", first, second)
    assert found.change is change
    assert (found.distance, found.largest) == pytest.approx((distance, largest), nan_ok=True)
    json.dumps(found.as_json(), allow_nan=False)


def test_large_tensors_are_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlast.checkpointing.tools.diff._CHUNK", 7)
    first = torch.randn(5, 9)
    second = first.clone()
    second[4, 8] += 2.0
    found = compare_tensors("name", first, second)
    assert found.largest == found.distance == pytest.approx(2.0, rel=1e-6)
    assert found.norms[0] == pytest.approx(first.double().norm().item())


# -- pins and prunes, as typed -----------------------------------------------------------------------------------------


def test_pin_and_prune(here: Path, outlast: Outlast) -> None:
    assert outlast("checkpoints", "pin", "my-run", "400").out.startswith("pinned 400@0001-")
    listed = outlast("checkpoints", "ls", "my-run").out.splitlines()
    assert [line.split()[0] for line in listed if line.endswith("pinned")] == ["400"]
    assert ", pinned" in outlast("checkpoints", "show", "my-run", "400").out
    shown = outlast("checkpoints", "prune", "my-run", "--keep-last", "2")
    assert re.findall(r"^would delete  (\d+)@", shown.out, re.MULTILINE) == ["600"], "200 is best by the run's settings"
    assert "with --yes to delete" in shown.err
    assert checkpoint("my-run", 600).is_dir()
    body = json.loads(
        outlast("checkpoints", "prune", "my-run", "--keep-last", "2", "--keep-best", "0", "--yes", "--json").out
    )
    assert body["done"]
    assert [name.split("@")[0] for name in body["deleted"]] == ["600", "200"]
    assert [name.split("@")[0] for name in body["kept"]] == ["1000", "800", "400"]
    assert json.loads(outlast("checkpoints", "verify", "my-run", "--json").out)
    assert "has no checkpoint 600; it has: 1000, 800, 400" in outlast("checkpoints", "pin", "my-run", "600", code=5).err
    assert json.loads(outlast("checkpoints", "unpin", "my-run", "400", "--json").out)["unpinned"].startswith("400@")
    assert "pinned: none" in outlast("checkpoints", "unpin", "my-run", "400", code=2).err
    outlast("checkpoints", "prune", "my-run", "--keep-last", "1", code=2)


# -- export ------------------------------------------------------------------------------------------------------------


def test_export_is_clean_and_takes_what_was_asked_for(here: Path, outlast: Outlast) -> None:
    said = json.loads(outlast("checkpoints", "export", "my-run", "600", "a/b/out", "--json").out)
    source = checkpoint("my-run", 600)
    assert said == {"source": str(source.absolute()), "written": ["a/b/out"]}
    out = Path("a/b/out")
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == expected | {"README.md"}
    for name in expected:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    outlast("checkpoints", "export", "my-run", "model", "final")
    newest = checkpoint("my-run", 1000) / "model.safetensors"
    assert Path("final/model.safetensors").read_bytes() == newest.read_bytes()


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_export_in_another_dtype(dtype: str, torch_dtype: torch.dtype, here: Path, outlast: Outlast) -> None:
    outlast("checkpoints", "export", "my-run", "out", "--dtype", dtype)
    source = weights_in(checkpoint("my-run", 1000) / "model.safetensors")
    for name, tensor in weights_in(Path("out/model.safetensors")).items():
        assert torch.equal(tensor, source[name].to(torch_dtype))
    assert transformers.AutoModelForCausalLM.from_pretrained("out").dtype is torch_dtype


def test_export_verifies(here: Path, outlast: Outlast) -> None:
    path = checkpoint("my-run", 400) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    for command in (["export", "my-run", "400", "out"], ["diff", "my-run", "200", "400"]):
        said = outlast("checkpoints", *command, code=5).err
        assert "checkpoint-400: model.safetensors: bytes changed" in said
        assert f"outlast checkpoints verify {here}/runs/my-run" in said
    assert [path.name for path in here.iterdir()] == ["runs"], "nothing appears of an export that failed"


def test_export_replaces_nothing(here: Path, outlast: Outlast) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    Path("empty").mkdir()
    assert "not empty; nothing was written" in outlast("checkpoints", "export", "my-run", "full", code=2).err
    said = outlast("checkpoints", "export", "my-run", "--weights", "w.bin", "--config", "full/mine.txt", code=2)
    assert "full/mine.txt is an existing file" in said.err
    assert not Path("w.bin").exists()
    assert Path("full/mine.txt").read_text() == "mine"
    outlast("checkpoints", "export", "my-run", "empty")
    assert Path("empty/config.json").is_file()


def test_export_as_older_guides_describe(here: Path, outlast: Outlast) -> None:
    """One directory for all three, as `torch.save`, `to_json_file` and `save_vocabulary` were used."""
    parts = ["--weights", "d/pytorch_model.bin", "--config", "d/config.json", "--vocab", "d"]
    said = outlast("checkpoints", "export", "my-run", "800", *parts)
    assert said.out.split() == ["d/pytorch_model.bin", "d/config.json", "d/vocab.json", "d/merges.txt"]
    assert "neither configuration nor tokenizer" in said.err
    state = torch.load("d/pytorch_model.bin", weights_only=True)
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr(), "tied, and written once"
    assert len(transformers.GPT2Tokenizer.from_pretrained("d")) == 300
    outlast("checkpoints", "export", "my-run", "800", "e", "--format", "pytorch", "--old-vocab")
    assert not Path("e/model.safetensors").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained("e")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    ids = [transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] for folder in ("d", "e")]
    assert ids[0] == ids[1]
    outlast("checkpoints", "export", "my-run", "--weights", "w.safetensors")
    assert "transformer.wte.weight" in weights_in(Path("w.safetensors"))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["Mine"], "model_type": "gpt2"}, "model class 'Mine' is not one of transformers"),
        ({"model_type": "gpt2"}, "model class None is not one of transformers"),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 1}, "has no transformer.wte.weight"),
    ],
)
def test_a_state_dict_that_cannot_be_whole_is_not_written(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    content = Content({}, {"config.json": json.dumps(config).encode()})
    with pytest.raises(ConfigError, match=said):
        export_directory(content, tmp_path / "out", weights_name="weights.bin", write_weights=write_state_dict)
    assert list(tmp_path.iterdir()) == [], "not even in part"


def test_weights_too_large_for_fp16(tmp_path: Path) -> None:
    """And for bf16 they are not; infinite ones and whole numbers stay what they are."""
    storage = LocalStorage(tmp_path)
    model = nn.Linear(1, 3, bias=False)
    model.register_buffer("count", torch.tensor(70_000))
    model.weight.data = torch.tensor([[1e5], [math.inf], [1.0]])
    checkpointer = Checkpointer(storage, "run", files={"config.json": b"{}"})
    checkpointer.resume(model)
    checkpointer.save(1, model, None, {})
    found = resolve_checkpoint(RunStore(storage, "run"), "newest", Retention())
    with pytest.raises(ConfigError, match="weight holds values too large for fp16"):
        converted(read_content(found), Dtype.FP16)
    content = converted(read_content(found), Dtype.BF16)
    assert content.weights["weight"].tolist() == [[99840.0], [math.inf], [1.0]]
    assert content.weights["count"].item() == 70_000
    assert json.loads(content.files["config.json"]) == {"dtype": "bfloat16"}


# -- vocabulary --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["my-run", "my-bert"])
def test_old_vocabulary_is_the_librarys_own(run: str, here: Path, tmp_path: Path) -> None:
    source = checkpoint(run, 200)
    saved = transformers.AutoTokenizer.from_pretrained(source)._tokenizer.model.save(str(tmp_path))
    ours = slow_tokenizer_files((source / "tokenizer.json").read_bytes())
    assert {Path(path).name for path in saved} == ours.keys()
    for path in map(Path, saved):
        if path.suffix == ".json":
            assert list(json.loads(path.read_text()).items()) == list(json.loads(ours[path.name]).items())
        else:
            assert path.read_bytes() == ours[path.name]


def test_tokens_that_were_added_later_are_not_lost(here: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("my-run", 200))
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "new")
    files = slow_tokenizer_files((tmp_path / "new/tokenizer.json").read_bytes())
    assert json.loads(files["added_tokens.json"]) == {"<pad>": 300}
    (tmp_path / "old").mkdir()
    for name, data in files.items():
        (tmp_path / "old" / name).write_bytes(data)
    assert transformers.GPT2Tokenizer.from_pretrained(tmp_path / "old").convert_tokens_to_ids("<pad>") == 300


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"type": "Unigram", "vocab": [["a", 0.0]]}, "a Unigram model"),
        ({"type": "WordPiece", "vocab": {"a": 0, "b": 2}}, "skips numbers"),
    ],
)
def test_no_old_vocabulary(model: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        slow_tokenizer_files(json.dumps({"model": model}).encode())
