"""Every text architecture of transformers, trained, stopped, killed and resumed to equal bits, or refused in advance.

The slice takes half a minute; all of it, with `-m faults`, an hour on two cores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import transformers

from tests.support.architectures.cases import Case, Ranks, Source, cases_of
from tests.support.architectures.record import RECORD, groups, outcomes
from tests.support.architectures.sweep import NOT_BUILT, REFUSED, WORKS, sweep

#: Kinds of which one each was once resumed to other bits, or raised: what each of them stands for.
SLICE = {
    "electra": "sequence-classification",  # weights that `from_pretrained` leaves unaligned
    "gpt_oss": "causal-lm",  # the same, in experts
    "roformer": "masked-lm",  # positions that only the constructor freezes
    "pegasus": "seq2seq-lm",
    "xlnet": "sequence-classification",  # unused parameters
    "fnet": "masked-lm",
    "led": "seq2seq-lm",
    "bigbird_pegasus": "seq2seq-lm",  # changes its attention in the first short batch
    "mamba": "causal-lm",
    "m2m_100": "seq2seq-lm",  # has no `prepare_decoder_input_ids_from_labels`
}


def without_reasons(types: Mapping[str, Mapping[str, Mapping[str, str]]]) -> list[tuple[str, ...]]:
    return [
        (kind, task, ranks, text.partition(": ")[0])
        for kind, tasks in types.items()
        for task, by_ranks in tasks.items()
        for ranks, text in by_ranks.items()
    ]


def test_the_slice_works(tmp_path: Path) -> None:
    cases = [Case(kind, task, Source.PATH, Ranks.DDP, 1) for kind, task in SLICE.items()]
    cases.append(Case("mixtral", "causal-lm", Source.CONFIG, Ranks.FSDP, 2))  # sharded experts, each one in the file
    verdicts = sweep(tmp_path, cases)
    assert [str(item) for item in verdicts if item.verdict != WORKS] == []


@pytest.mark.faults
@pytest.mark.parametrize("types", groups(), ids=lambda types: f"{types[0]} to {types[-1]}")
def test_every_architecture_works_or_is_refused(types: list[str], tmp_path: Path) -> None:
    verdicts = sweep(tmp_path, [case for kind in types for case in cases_of(kind)])
    assert [str(item) for item in verdicts if item.verdict not in (WORKS, REFUSED, NOT_BUILT)] == []
    record = json.loads(RECORD.read_text())
    if record["transformers"] == transformers.__version__:
        assert without_reasons(outcomes(verdicts)) == without_reasons({kind: record["types"][kind] for kind in types})
