"""The model card of an export, from the run's record, in the form of the Hugging Face Hub.

Unknown fields are omitted, never guessed. Intended use, limits and license are left to the user.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from outlast.checkpointing.escaping import escaped
from outlast.checkpointing.format.layout import RECORD
from outlast.checkpointing.redaction import redact
from outlast.checkpointing.run_store.attempt_history import REGROUPED
from outlast.checkpointing.run_store.claims import read_claim
from outlast.checkpointing.run_store.typed_json import section
from outlast.checkpointing.storage.base import read_object
from outlast.checkpointing.tools.export import ADAPTER_WEIGHTS, Content
from outlast.checkpointing.tools.query import ResolvedCheckpoint
from outlast.cluster.formatting import counted
from outlast.cluster.monitoring.timeline import TimelineReader
from outlast.trainers.config.task_table import TASKS

CARD = "README.md"
#: What the Hub calls the tasks.
PIPELINES = {
    "causal-lm": "text-generation",
    "chat": "text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "seq2seq-lm": "text2text-generation",
    "multiple-choice": "multiple-choice",
}
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_LICENSE = "# license: it is yours to choose; https://hf.co/docs/hub/repositories-licenses has the names\n"


def model_card(found: ResolvedCheckpoint, content: Content) -> bytes:
    """The card of a checkpoint, or of the finished model, as `README.md`; `content` is what is written of it."""
    known = _CardBuilder(found, content)
    return redact(f"---\n{_LICENSE}{known.front_matter().to_yaml()}\n---\n\n{''.join(known.body())}").encode()


class _CardBuilder:
    """The card's front matter and text."""

    def __init__(self, found: ResolvedCheckpoint, content: Content) -> None:
        self._found = found
        self._is_adapter = content.weights_name == ADAPTER_WEIGHTS
        attempt = found.manifest.ref.attempt
        self._declaration: Mapping[str, Any] = found.declaration or {}
        self._numerics_settings: Mapping[str, Any] = section(self._declaration, "mathematics")
        self._model: Mapping[str, Any] = section(self._numerics_settings, "model")
        self._task = str(self._model.get("task", ""))
        self._settings: Mapping[str, Any] = section(read_claim(found.store, attempt), "settings")
        path = f"{found.store.launch_dir(found.manifest.launch)}/{RECORD}"
        self._record: dict[str, Any] = {}
        with found.store.going_on(path):
            self._record = read_object(found.store.storage, path)
        metrics = sorted(found.manifest.metrics.items())
        self._metrics = {name: value for name, value in metrics if name.startswith("eval_")}
        timeline = TimelineReader(found.store).update()
        ends = Counter(end.cause for item, end in timeline.ends.items() if item < attempt)
        self._num_regroupings = ends.pop(REGROUPED, 0)
        self._ends_before = ends

    @property
    def _base_path(self) -> str:
        """`model.path` of the run: a hub id or a directory; empty for a model from scratch."""
        whole = section(self._record, "settings")
        return str(section(whole or self._settings, "model").get("path") or "")

    @property
    def _base_model(self) -> str | None:
        """The Hub's id of the model that the run began with; None for one from scratch, or from a directory."""
        path = self._base_path
        is_id = bool(_HUB_ID.fullmatch(path)) and not path.startswith(".")
        return path if is_id and (section(self._record, "settings") or "/" in path) else None

    def front_matter(self) -> ModelCardData:
        pipeline = PIPELINES.get(self._task)
        results = [
            EvalResult(
                task_type=pipeline or "other",
                dataset_type="outlast",
                dataset_name=self._eval_names or self._found.store.run,
                dataset_revision=str(self._declaration.get("data") or "") or None,
                metric_type=name.removeprefix("eval_"),
                metric_name=name,
                metric_value=_rounded(value),
            )
            for name, value in self._metrics.items()
        ]
        return ModelCardData(
            base_model=self._base_model,
            library_name="peft" if self._is_adapter else None if self._model.get("class_") else "transformers",
            pipeline_tag=pipeline,
            tags=["outlast", *(["lora"] if "lora" in section(self._settings, "model") else [])],
            model_name=self._found.store.run if results else None,
            eval_results=results or None,
        )

    def _names(self, key: str) -> str:
        """The names of the files of a setting under `data`; their paths are not published."""
        given = section(self._settings, "data").get(key)
        places = given if isinstance(given, list) else [given]
        return ", ".join(PurePosixPath(place).name for place in places if isinstance(place, str))

    @property
    def _data_names(self) -> str:
        return self._names("train")

    @property
    def _eval_names(self) -> str:
        """The names of the files with the scored rows; of held-out rows, which share of the training files."""
        names = self._names("eval")
        return f"{self._data_names} ({names} held out)" if names.endswith("%") and self._data_names else names

    def body(self) -> Iterator[str]:
        found = self._found
        base = f"[{self._base_model}](https://hf.co/{self._base_model})" if self._base_model else None
        if base is None and (name := PurePosixPath(self._base_path).name):
            base = f"{_code(name)}, a directory of the machine that trained it,"
        kind = self._task if self._task in TASKS else "a task of its own"
        origin = f"fine-tuned from {base}" if base else "trained"
        yield f"# {found.store.run}\n\nA model {origin} for {kind}, after step {found.manifest.ref.step:,} of its run. "
        yield "Intended use and limitations: to be completed.\n"
        if self._metrics:
            rows = _code(self._eval_names) if self._eval_names else "rows that were held out of training"
            yield f"\n## Metrics\n\nOn {rows}.\n\n| | |\n|---|---|\n"
            yield from (f"| {_inline(name)} | {value:.4f} |\n" for name, value in self._metrics.items())
        yield "\n## Data\n\n"
        yield _code(self._data_names) if self._data_names else "Not recorded."
        if fingerprint := self._declaration.get("data"):
            yield f", fingerprint {_code(fingerprint)}: of the bytes of the files, their order, and how they were cut"
        yield ".\n"
        yield "\n## Training\n\n"
        if made := self._declaration:
            versions = ", ".join(f"{name} {number}" for name, number in section(made, "versions").items())
            size = made.get("world_size")
            workers = counted(size, "worker") if isinstance(size, int) else "workers"
            yield _inline(f"- {workers} ({made.get('parallel')}, {made.get('device')}); {versions}") + "\n"
        code = section(self._record, "code")
        if code.get("git"):
            changes = code.get("num_changed")
            yield f"- code at commit {_code(code['git'])}"
            yield f", {counted(changes, 'file')} changed since\n" if isinstance(changes, int) and changes else "\n"
        causes = ", ".join(f"{count} × {_inline(cause)}" for cause, count in sorted(self._ends_before.items()))
        yield f"- restarts survived: {self._ends_before.total()}" + (f" ({causes})\n" if causes else "\n")
        if self._num_regroupings:
            yield f"- losses of workers survived in memory: {self._num_regroupings}\n"
        yield "- checkpoint verified against its digests when it was exported\n"
        if self._numerics_settings:
            text = yaml.safe_dump(_without_empty(self._numerics_settings), sort_keys=False, allow_unicode=True)
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            yield "\n## Settings\n\nAll that affect the numerical result, beside the data:\n\n"
            yield f"{fence}yaml\n{text}{fence}\n"


def _rounded(value: Any) -> Any:
    """Round a score to six significant digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _inline(text: str) -> str:
    """Format a text for one line of Markdown: as it is, neither markup nor HTML."""
    return re.sub(r"([\\\\`*\[\]<>|])", r"\\\1", escaped(text))


def _code(text: object) -> str:
    return f"`{escaped(str(text)).replace('`', chr(39))}`"


def _without_empty(value: Any) -> Any:
    """Copy without empty values."""
    if isinstance(value, Mapping):
        return {key.rstrip("_"): _without_empty(item) for key, item in value.items() if item not in (None, {}, [])}
    return value
