"""The check of a share of held-out rows before the data is prepared: it reads rows until both splits have enough."""

from itertools import islice

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.columns import ColumnMapping, texts_in
from outlast.trainers.data.readers import read_rows
from outlast.trainers.preparation.encode import is_held_out
from outlast.trainers.tasks.base import Task

#: Rows that are read at most: a share that holds out none of so many is found by the preparation.
_MAX_ROWS = 100_000
#: Bytes that a tokenizer's normalization (NFKC) makes of one, at most: 33 of the 3 bytes of U+FDFA.
_MAX_GROWTH = 11


def check_held_out(config: TrainingConfig, task: type[Task], chosen: ColumnMapping) -> None:
    """Raise ConfigError if `data.eval` is a share that leaves a split without a row, or surely without a sample.

    A tokenizer makes at most one token of a normalized byte, one of a text's beginning and one of its end.
    """
    data = config.data
    if data.eval_share is None:
        return
    packs = (
        "packing" in task.options and data.packing and not any(column.role == "completion" for column in chosen.columns)
    )
    needed = data.max_length if packs else 0
    num_rows, most_tokens, total = [0, 0], [0, 0], 0
    rows = read_rows(data.train, chosen.names, data.csv, chosen.sparse_names)
    try:
        for total, row in enumerate(islice(rows, _MAX_ROWS), 1):
            if row.fault or chosen.fault(row.values):  # reported by itself, or skipped by the preparation
                return
            split = int(is_held_out(config.seed, total - 1, data.eval_share))
            num_rows[split] += 1
            num_bytes = sum(len(text.encode(errors="replace")) for text in texts_in(list(row.values)))
            most_tokens[split] += 2 + _MAX_GROWTH * num_bytes
            if min(num_rows) and min(most_tokens) >= needed:
                return
    except ConfigError:
        return
    if total >= _MAX_ROWS or not total:
        return
    split = int(not num_rows[1] or (num_rows[0] > 0 and most_tokens[1] < needed))
    name, which = (("eval", "larger"), ("train", "smaller"))[1 - split]
    count = "none" if not num_rows[split] else f"{num_rows[split]:,}"
    problem = f"data.eval: {data.eval} of the {total:,} rows of {data.train} are held out: {count} of them for {name}"
    hint = f"set a {which} share, or data.eval to a file of its own"
    if num_rows[split]:
        problem += f", with at most {most_tokens[split]:,} tokens, less than one sample (data.max_length {needed})"
        hint += ", or set a smaller data.max_length"
    raise ConfigError(problem, hint=hint)
