"""Names of the built-in tasks and their classes. Imports no task: settings are checked before torch is loaded."""

import re

from outlast.checkpointing.error_hints import did_you_mean

TASKS = {
    "causal-lm": "outlast.trainers.tasks.causal_lm:CausalLM",
    "chat": "outlast.trainers.tasks.chat:Chat",
    "masked-lm": "outlast.trainers.tasks.masked_lm:MaskedLM",
    "sequence-classification": "outlast.trainers.tasks.classification:SequenceClassification",
    "token-classification": "outlast.trainers.tasks.token_classification:TokenClassification",
    "question-answering": "outlast.trainers.tasks.question_answering:QuestionAnswering",
    "seq2seq-lm": "outlast.trainers.tasks.seq2seq:Seq2SeqLM",
    "multiple-choice": "outlast.trainers.tasks.multiple_choice:MultipleChoice",
    "double-heads": "outlast.trainers.tasks.multiple_choice:DoubleHeads",
}
_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_dotted(place: str) -> bool:
    """Check whether this has the form `package.module:Name`."""
    return _DOTTED.fullmatch(place) is not None


def check_task_name(name: str) -> str:
    """Return the name if it is in the table or a dotted path. Raises ValueError with the nearest name otherwise."""
    if name in TASKS or is_dotted(name):
        return name
    known = did_you_mean(name, TASKS) or f"; known: {', '.join(TASKS)}"
    raise ValueError(f"unknown task {name!r}{known} (a task of your own is package.module:Class)")
