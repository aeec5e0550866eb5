"""The `preview` command: what a run will learn, before it starts. It must work without Ray."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.escaping import escaped
from outlast.cluster.cli.options import AsJson, Overrides, RunFile
from outlast.cluster.output import make_console, print_json, print_line

if TYPE_CHECKING:
    from rich.text import Text

    from outlast.checkpointing.storage.base import Storage
    from outlast.trainers.preview import Passage, PreviewSample

#: Rows to prepare unless all are wanted.
NUM_ROWS = 1000
_LEARNED = "bold green"


class SplitName(Enum):
    """A split of the data."""

    TRAIN = "train"
    EVAL = "eval"


def preview(
    run_file: RunFile,
    overrides: Overrides = None,
    rows: Annotated[int, Option(min=0, help="Number of samples to print.")] = 3,
    split: Annotated[SplitName, Option(help="The training or the evaluation samples.")] = SplitName.TRAIN,
    all_rows: Annotated[
        bool, Option("--all", help="Prepare all rows, which are kept for the run, not only the first 1,000.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a run will learn: a few samples with the learned tokens marked, guesses, and counts of cut rows.

    Learned tokens are coloured on a terminal, and between ⟦ and ⟧ elsewhere; → precedes what is predicted in place of
    the text. Unless all rows are prepared, nothing is written.
    """
    from outlast.cluster.config.run_file import load_run
    from outlast.trainers.user_code import make_importable

    config, _ = load_run(str(run_file), overrides or [])
    make_importable(str(run_file.parent.absolute()))
    config = config.at_home(run_file.parent)
    if split is SplitName.EVAL and not config.data.eval:
        raise ConfigError("data.eval is not set: there are no evaluation samples", hint="set it, or use --split train")
    with tempfile.TemporaryDirectory() as folder:
        from outlast.checkpointing.storage.local import LocalStorage
        from outlast.trainers.preparation.prepare import prepare, prepare_first

        storage: Storage = config.store.storage if all_rows else LocalStorage(Path(folder))
        prepared = prepare(config, storage) if all_rows else prepare_first(config, storage, split.value, NUM_ROWS)
        from outlast.trainers.preparation.data_summary import describe_summary, summarize_data
        from outlast.trainers.preview import preview_samples

        facts = summarize_data(config, prepared)
        samples = preview_samples(config, prepared, storage, split.value, rows)
    is_part = not all_rows and prepared.num_rows[split.value] + prepared.num_bad_rows >= NUM_ROWS
    if as_json:
        body = {"split": split.value, "first_rows_only": NUM_ROWS if is_part else None, **facts}
        print_json({**body, "samples": list(map(asdict, samples))}, redacted=False)
        return
    if is_part:
        print_line(f"from the first {NUM_ROWS:,} rows of the {split.value} split; --all prepares all rows")
    for line in [*(f"note: {text}" for text in prepared.notes), *describe_summary(facts)]:
        print_line(line)
    for sample in samples:
        print_line()
        print_line(f"{split.value} sample {sample.number}, {sample.num_tokens:,} tokens")
        _print_sample(sample)


def _print_sample(sample: PreviewSample) -> None:
    from outlast.trainers.preview import Passage, Segment

    console = make_console(redacted=False)
    is_coloured = console.is_terminal and console.color_system is not None and not console.no_color
    targets = [Passage(name, (Segment(text, is_learned=True),)) for name, text in sample.targets.items()]
    for passage in (*sample.passages, *targets):
        console.print(_line(passage, is_coloured=is_coloured), soft_wrap=True)


def _line(passage: Passage, *, is_coloured: bool) -> Text:
    """Return a text with its name; a line break is shown, and made."""
    from rich.text import Text

    line = Text.assemble((f"  {passage.name}: ", "dim"))
    for segment in passage.segments:
        text = segment.text + (f"→{segment.target}" if segment.target else "")
        shown = "\\n\n    ".join(map(escaped, text.split("\n")))
        if segment.is_learned and not is_coloured:
            shown = f"⟦{shown}⟧"
        line.append(shown, _LEARNED if segment.is_learned else "")
    return line
