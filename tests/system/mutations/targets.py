"""What is mutated, what outlast makes of it, and what an independent reader does."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pandas
import pyarrow
import torch
import transformers
import yaml
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.preflight.validate import validate
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.preparation.prepare import prepare
from tests.system.mutations.isolated import Ending
from tests.system.mutations.mutate import mutate

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()

ROWS = [
    {"text": "Assert statements insert debugging assertions", "label": "good", "number": 3, "note": None},
    {"text": 'a "quoted" text, with a comma', "label": "bad", "number": 1, "note": "x"},
    {"text": "naïve café 😀", "label": "good", "number": 7, "note": None},
    {"text": "two\nlines", "label": "bad", "number": 2, "note": "y"},
    {"text": "tabs\tand 'apostrophes'", "label": "bad", "number": 5, "note": ""},
]
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
DATA = ("jsonl", "json", "csv", "tsv", "txt", "parquet", "arrow", "folder")
_PLACE = re.compile(r"\b(line|position) \d+|\b(model|data|train|scale|checkpoint)\.[a-z_]+")
MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors")
TARGETS = (*DATA, *MODEL, "run.yaml")


def _bytes_tokenizer() -> Any:
    """One token for each byte, so that token ids give back the text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")


class Workshop:
    """A folder with a small model, rows in every type of file, and a run file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "model"
        self.tokenizer = _bytes_tokenizer()
        torch.manual_seed(3)
        config = transformers.LlamaConfig(
            vocab_size=len(self.tokenizer),
            **SMALL,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
            id2label={0: "bad", 1: "good"},
            label2id={"bad": 0, "good": 1},
        )
        transformers.LlamaForCausalLM(config).save_pretrained(self.model)
        self.tokenizer.save_pretrained(self.model)
        self.original = folder / "original"
        self.original.mkdir()
        self._write_rows()

    def _write_rows(self) -> None:
        here = self.original
        (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        (here / "rows.json").write_text(json.dumps(ROWS))
        for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
            with (here / f"rows.{suffix}").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
                writer.writeheader()
                writer.writerows(ROWS)
        (here / "rows.txt").write_text("".join(str(row["text"]).replace("\n", " ") + "\n" for row in ROWS))
        table = pyarrow.Table.from_pylist(ROWS)
        parquet.write_table(table, here / "rows.parquet")
        with pyarrow.OSFile(str(here / "rows.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        datasets.Dataset.from_list(ROWS).save_to_disk(here / "rows.folder")

    def run(self, target: str, seed: int) -> Ending:
        """Mutate a file of this kind, and look what outlast makes of it."""
        place = self.folder / "try"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            if target in DATA:
                return self._data(target, seed, place)
            return self._settings(place, seed) if target == "run.yaml" else self._model(target, seed, place)
        except BaseException as error:  # noqa: BLE001 - it is the finding; a panic of tokenizers is no Exception
            return Ending("unexpected", f"{type(error).__name__}: {str(error)[:300]}")

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _data(self, target: str, seed: int, place: Path) -> Ending:
        path = place / f"rows.{target}"
        if target == "folder":
            shutil.copytree(self.original / "rows.folder", path)
            files = sorted(item for item in path.iterdir())
            mutated = files[seed % len(files)]
            mutated.write_bytes(mutate(mutated.read_bytes(), mutated.suffix, seed))
        else:
            path.write_bytes(mutate((self.original / path.name).read_bytes(), path.suffix, seed))
        task = "causal-lm" if target == "txt" else "sequence-classification"
        body = {
            "name": "run",
            "model": {"path": str(self.model), "task": task},
            "data": {"train": str(path), "max_length": 6000 if task != "causal-lm" else 8, "max_bad_rows": 100},
            "checkpoint": {"storage": str(place / "runs")},
            "train": {"steps": 1, "batch": 1, "micro_batch": 1},
        }
        storage = LocalStorage(place / "runs")
        try:
            prepared = prepare(TrainingConfig.model_validate(body), storage)
        except ConfigError as error:
            known = path.name in error.message or "max_bad_rows" in error.message
            return Ending("refused", "" if known else f"it names no file: {error.message[:300]}")
        if target == "txt":
            return Ending("accepted")
        samples = prepared.split(storage, "train").take(range(prepared.num_samples))
        classes = prepared.facts["classes"]
        if prepared.facts["problem"] != "single-label":
            return Ending("accepted")
        ours = [(self._text(sample["input_ids"]), classes[int(sample["labels"][0])]) for sample in samples]
        try:
            theirs = _READERS[target](path)
        except Exception:  # noqa: BLE001 - the reader's own; it cannot tell
            theirs = None
        if theirs is None:
            return Ending("accepted")
        usable = [(text, _class_of(label)) for text, label in theirs if isinstance(text, str) and _is_class(label)]
        if target in ("csv", "tsv"):  # some rows are unusable here, and completed there
            rest = iter(usable)
            if len(usable) - len(ours) <= prepared.num_bad_rows and all(row in rest for row in ours):
                return Ending("same samples")
        return Ending("same samples", "" if ours == usable else f"{ours} instead of {usable}")

    def _text(self, ids: Any) -> str:
        tokens = self.tokenizer.convert_ids_to_tokens(ids.tolist())
        return str(self.tokenizer.backend_tokenizer.decoder.decode([token for token in tokens if token != "<pad>"]))

    # -- model and settings --------------------------------------------------------------------------------------------

    def _run_file(self, place: Path, model: Path, task: str = "sequence-classification") -> Path:
        body = {
            "name": "run",
            "model": {"path": str(model), "task": task},
            "data": {"train": str(self.original / "rows.jsonl"), "max_length": 32},
            "train": {"epochs": 1, "batch": 2, "micro_batch": 1, "lr": 1e-3, "clip": 1.0},
            "scale": {"workers": 1, "cpus_per_worker": 0.5},
            "checkpoint": {"storage": str(place / "runs"), "every": 2, "keep_last": 2},
        }
        (place / "run.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
        return place / "run.yaml"

    def _model(self, target: str, seed: int, place: Path) -> Ending:
        model = shutil.copytree(self.model, place / "model")
        path = model / target
        path.write_bytes(mutate(path.read_bytes(), path.suffix, seed))
        task = "causal-lm" if seed % 2 else "sequence-classification"
        return self._validated(self._run_file(place, model, task), (str(model), target, "model"))

    def _settings(self, place: Path, seed: int) -> Ending:
        run_file = self._run_file(place, self.model)
        run_file.write_bytes(mutate(run_file.read_bytes(), ".yaml", seed))
        with contextlib.chdir(place):
            return self._validated(Path("run.yaml"), ())

    def _validated(self, run_file: Path, named: tuple[str, ...]) -> Ending:
        try:
            found = validate(str(run_file), deep=True)
        except OutlastError as error:
            return Ending("refused", "" if run_file.name in error.message else f"no file: {error.message[:300]}")
        if not found:
            return Ending("accepted")
        messages = [(item.finding.path, item.finding.message, item.finding.suggestion) for item in found]
        texts = [f"{'.'.join(map(str, path))}: {message} {suggestion}" for path, message, suggestion in messages]
        if named and not any(name in text for name in named for text in texts):
            return Ending("refused", f"it names no file: {texts[0][:300]}")
        if re.search(r"unexpected \w*(Error|Exception)", texts[0]):
            return Ending("refused", texts[0][:300])
        has_place = all(item.line or item.finding.path or _PLACE.search(item.finding.message) for item in found)
        return Ending("refused", "" if has_place else f"no place: {texts[0][:300]}")


def _is_whole(row: Any) -> bool:
    """Whether all characters of a row are whole; JSON can hold half of a surrogate pair."""
    return not any("\ud800" <= letter <= "\udfff" for letter in json.dumps(row, ensure_ascii=False))


def _is_class(label: Any) -> bool:
    return isinstance(label, (str, int)) or (isinstance(label, float) and label.is_integer())


def _class_of(label: Any) -> str:
    return str(int(label)) if isinstance(label, float) else str(label)


# -- independent readers: text and label of each row; None where they cannot tell -----------------------------------


def _json_lines(path: Path) -> list[tuple[Any, Any]] | None:
    rows = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line.decode("utf-8-sig")) if line.strip() else None
            if isinstance(row, dict) and _is_whole(row):
                rows.append((row.get("text"), row.get("label")))
    return rows


def _json_list(path: Path) -> list[tuple[Any, Any]] | None:
    body = json.loads(path.read_bytes())
    return (
        [(row.get("text"), row.get("label")) for row in body if isinstance(row, dict) and _is_whole(row)]
        if isinstance(body, list)
        else None
    )


def _delimited(delimiter: str) -> Callable[[Path], list[tuple[Any, Any]] | None]:
    def read(path: Path) -> list[tuple[Any, Any]] | None:
        text = path.read_bytes().decode("utf-8-sig", "replace")
        if "�" in text or "\x00" in text or "\r" in text.replace("\r\n", ""):
            return None
        try:
            table = pandas.read_csv(
                io.StringIO(text), sep=delimiter, dtype=str, keep_default_na=False, na_values=[""], index_col=False
            )
        except (ValueError, pandas.errors.ParserError):
            return None
        if not {"text", "label"} <= set(table):
            return None
        # pandas completes short rows, which are unusable here
        complete = [
            len(row) == table.shape[1] for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row
        ][1:]
        if len(complete) != len(table):
            return None
        pairs = zip(complete, table["text"], table["label"], strict=True)
        return [(text, label) for whole, text, label in pairs if whole]

    return read


def _columnar(read: Callable[[Path], pyarrow.Table]) -> Callable[[Path], list[tuple[Any, Any]] | None]:
    def pairs(path: Path) -> list[tuple[Any, Any]] | None:
        rows = read(path).to_pylist()
        return [(row.get("text"), row.get("label")) for row in rows]

    return pairs


def _read_arrow(path: Path) -> pyarrow.Table:
    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_file(source).read_all()


_READERS: dict[str, Callable[[Path], list[tuple[Any, Any]] | None]] = {
    "jsonl": _json_lines,
    "json": _json_list,
    "csv": _delimited(","),
    "tsv": _delimited("\t"),
    "parquet": _columnar(parquet.read_table),
    "arrow": _columnar(_read_arrow),
    "folder": _columnar(lambda path: datasets.load_from_disk(str(path)).with_format("arrow")[:]),
}
