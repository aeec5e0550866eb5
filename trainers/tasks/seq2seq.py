"""Sequence to sequence: read a source text, generate a target text."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from torch import nn

from outlast.checkpointing.state.named_weights import unwrap
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType
from outlast.trainers.tasks.base import Batch, Record, TokenTask, ints
from outlast.trainers.tasks.greedy_decoding import generate_continuation


class Seq2SeqLM(TokenTask):
    """Generate the target of a source. In training the decoder reads the target shifted by one."""

    auto_class = "AutoModelForSeq2SeqLM"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("source", ColumnType.TEXT),
        Column("target", ColumnType.TEXT, is_target=True),
    )
    options = ("max_target_length",)
    special_tokens: ClassVar = {
        "pad_token": "<|pad|>"
    }  # not the end token: the decoder starts with it, and must learn to predict the end token
    template = ("$A <|endoftext|>", "$A <|endoftext|> $B <|endoftext|>")

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        inner, settings = self.tokenizer.inner, self.settings
        sources = inner([record["source"] for record in records], truncation=True, max_length=settings.max_length)
        targets = inner(
            text_target=[record["target"] for record in records], truncation=True, max_length=settings.max_target_length
        )
        for source, target in zip(sources["input_ids"], targets["input_ids"], strict=True):
            yield {"input_ids": ints(source), "labels": ints(target)}

    def fault(self, record: Record) -> str | None:
        return None if record["source"] and record["target"] else "its source or target is empty"

    def configure(self, config: Any) -> None:
        super().configure(config)
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = config.pad_token_id

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        inner: Any = unwrap(model)
        shifted = inner.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        return model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=shifted,
            use_cache=False,
        )

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        inner, settings = self.tokenizer.inner, self.settings
        for record in records:
            given = inner(record["source"], truncation=True, max_length=settings.max_length, return_tensors="pt")
            tokens = generate_continuation(self, unwrap(model), given, settings.max_target_length)
            yield {"source": record["source"], "target": inner.decode(tokens, skip_special_tokens=True)}
