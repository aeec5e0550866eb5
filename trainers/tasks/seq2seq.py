"""Sequence to sequence: read a source text, generate a target text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from outlast.checkpointing.error_hints import did_you_mean
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.state.named_weights import unwrap
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType
from outlast.trainers.tasks.base import IGNORED, Batch, Record, TokenTask, ints
from outlast.trainers.tasks.greedy_decoding import generate_continuation

if TYPE_CHECKING:
    from outlast.trainers.config.data import DataSettings
    from outlast.trainers.data.tokenizer import Tokenizer


class Seq2SeqLM(TokenTask):
    """Generate the target of a source. In training the decoder reads the target shifted by one."""

    auto_class = "AutoModelForSeq2SeqLM"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("source", ColumnType.TEXT),
        Column("target", ColumnType.TEXT, is_target=True),
    )
    options = ("max_target_length", "source_language", "target_language")
    special_tokens: ClassVar = {
        "pad_token": "<|pad|>"
    }  # not the end token: the decoder starts with it, and must learn to predict the end token
    template = ("$A <|endoftext|>", "$A <|endoftext|> $B <|endoftext|>")

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        super().__init__(settings, tokenizer, facts)
        self._smoothing, self._has_streams = 0.0, False
        for attribute in ("source_language", "target_language"):
            if (language := getattr(settings, attribute)) is not None:
                _set_language(tokenizer.inner, attribute, language)

    @classmethod
    def unsupported_reason(cls, config: Any) -> str | None:
        if not getattr(config, "is_encoder_decoder", False):
            return "it is not an encoder with a decoder"
        decoder = config.decoder if config.model_type == "encoder-decoder" else None
        if decoder is not None and not (decoder.is_decoder and decoder.add_cross_attention):
            return "is_decoder and add_cross_attention of its decoder must be true"
        return None

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        inner, settings = self.tokenizer.inner, self.settings
        if getattr(inner, "tgt_lang", "") is None:  # transformers would mark the targets as it marks the sources
            raise ConfigError(
                f"{type(inner).__name__} marks texts with their language, and has no language of targets",
                hint="set data.target_language, and data.source_language",
            )
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
        if getattr(config, "decoder_start_token_id", None) is None and config.model_type not in _START_OF_THEIR_OWN:
            raise ConfigError(
                f"the configuration of the {config.model_type} model has no decoder_start_token_id, which its decoder "
                "reads before a target",
                hint="set it in config.json (or model.config) to the token that the model was trained with, such as "
                "the id of its bos, cls or pad token",
            )
        if config.model_type == "prophetnet":
            self._smoothing, self._has_streams = config.eps, not config.disable_ngram_loss

    def configure_generation(self, config: Any) -> None:
        """Let `generate` write in the target's language, as transformers' own examples do."""
        inner = self.tokenizer.inner
        if getattr(inner, "tgt_lang", None) is None:
            return
        language = inner.convert_tokens_to_ids(inner.tgt_lang)
        if (labels := inner(text_target="a")["input_ids"])[-1] == language:  # mBART: the decoder reads the mark first
            config.decoder_start_token_id, config.forced_bos_token_id = language, None
        elif self._leading_tokens() == labels[:1]:
            config.forced_bos_token_id = labels[0]
            if config.decoder_start_token_id is None:
                config.decoder_start_token_id = labels[-1]

    def _leading_tokens(self) -> list[int]:
        """Return the tokens that precede the first word of a target, such as the mark of its language."""
        empty, letter = (self.tokenizer.inner(text_target=text)["input_ids"] for text in ("", "a"))
        return [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], zip(empty, letter, strict=False))]

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=decoder_inputs(unwrap(model), batch["labels"]),
            use_cache=False,
        )

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Compute the sum of the loss. ProphetNet predicts several tokens at each position: the mean over these."""
        streams = [outputs.logits]
        if self._has_streams and outputs.logits_ngram is not None:
            streams += outputs.logits_ngram.unbind(1)
        losses = [
            functional.cross_entropy(
                logits.float().flatten(0, 1),
                batch["labels"].flatten(),
                reduction="sum",
                ignore_index=IGNORED,
                label_smoothing=self._smoothing,
            )
            for logits in streams
        ]
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0]

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        inner, settings = self.tokenizer.inner, self.settings
        start = self._target_start(unwrap(model))
        num_new = settings.max_target_length + 1 - start.shape[1]
        for record in records:
            given = inner(record["source"], truncation=True, max_length=settings.max_length, return_tensors="pt")
            tokens = generate_continuation(self, unwrap(model), {**given, "decoder_input_ids": start}, num_new)
            yield {"source": record["source"], "target": inner.decode(tokens, skip_special_tokens=True)}

    def _target_start(self, model: nn.Module) -> torch.Tensor:
        """Return what the decoder reads before it writes a target's first word, such as the token of the language."""
        letter = torch.tensor([self.tokenizer.inner(text_target="a")["input_ids"]])
        return decoder_inputs(model, letter)[:, : len(self._leading_tokens()) + 1]


#: Types whose decoder begins with a token of the target itself, or with the token for the beginning or end of texts.
_START_OF_THEIR_OWN = ("mbart", "plbart", "fsmt", "t5gemma", "t5gemma2")


def _set_language(inner: Any, attribute: str, language: str) -> None:
    """Set the language that the tokenizer marks sources or targets with. Raises ConfigError if it has none such."""
    name = {"source_language": "src_lang", "target_language": "tgt_lang"}[attribute]
    if not hasattr(inner, name):
        raise ConfigError(
            f"data.{attribute} is set, and {type(inner).__name__} does not mark texts with a language",
            hint=f"leave data.{attribute} out, or use the tokenizer of a multilingual model",
        )
    known = [*getattr(inner, "lang_code_to_token", {}), *inner.all_special_tokens]
    known += [str(token) for token in inner.added_tokens_decoder.values()]
    if language not in known and f"__{language}__" not in known:
        raise ConfigError(
            f"data.{attribute} {language!r} is not a language of {type(inner).__name__}{did_you_mean(language, known)}",
            hint="name it as the tokenizer does, for example eng_Latn (NLLB), en_XX (mBART) or en (M2M-100)",
        )
    setattr(inner, name, language)


def decoder_inputs(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """Shift labels by one position, as the model does when its forward is given labels. Returns the decoder's input."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted: torch.Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels.clone())  # FSMT changes them
        return shifted
    config = model.config
    shifted = functional.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
    return shifted.masked_fill(shifted == IGNORED, config.pad_token_id)
