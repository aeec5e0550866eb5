"""Sequence to sequence: decoder inputs, losses and generated texts are those of plain transformers, for every type."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import DataCollatorForSeq2Seq, MBartTokenizer, NllbTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model, model_class
from outlast.trainers.preparation.prepare import prepare
from outlast.trainers.tasks.base import IGNORED
from outlast.trainers.tasks.seq2seq import Seq2SeqLM
from tests.support.groups.worker_group import run_group, tiny_config
from tests.support.tasks.seq2seq_models import CONFIGS, DECODES, END, PAD, VOCABULARY, build, tiny


def samples() -> list[dict[str, list[int]]]:
    """Three sources and targets of different lengths, as a tokenizer gives them."""
    generator = torch.Generator().manual_seed(5)
    lengths = ((9, 4), (5, 7), (7, 5))
    texts = [[torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
    return [{"input_ids": [*source, END], "labels": [*target, END]} for source, target in texts]


class Padding(transformers.PreTrainedTokenizerFast):
    """A tokenizer that the collator of transformers pads with."""

    def __init__(self) -> None:
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<pad>": PAD}, "a"))
        super().__init__(tokenizer_object=inner, pad_token="<pad>")


def collated(model: Any) -> dict[str, torch.Tensor]:
    """The batch of transformers' own collator for a model."""
    collator = DataCollatorForSeq2Seq(Padding(), model=model, label_pad_token_id=IGNORED)
    return dict(collator([{**item, "attention_mask": [1] * len(item["input_ids"])} for item in samples()]))


def make_task(config: Any = None) -> Seq2SeqLM:
    task = Seq2SeqLM(DataSettings(train="none"), Tokenizer(Padding()), {})
    if config is not None:
        task.configure(config)
    return task


def test_every_type_that_reads_and_writes_text_is_tried() -> None:
    """All others that transformers maps to this task read sound, and are decoders."""
    configs = [transformers.CONFIG_MAPPING[name]() for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES]
    assert {config.model_type for config in configs if config.is_encoder_decoder} == CONFIGS.keys()


@pytest.mark.parametrize("model_type", ["qwen2_audio", "voxtral"])
def test_a_decoder_is_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match=f"not support {model_type} models: it is not an encoder with a decoder"):
        model_class(Seq2SeqLM, transformers.CONFIG_MAPPING[model_type]())


@pytest.mark.parametrize("missing", DECODES)
def test_a_decoder_that_sees_what_it_predicts_or_not_the_source_is_refused(missing: str) -> None:
    config = tiny("encoder-decoder")
    setattr(config.decoder, missing, False)
    with pytest.raises(ConfigError, match="is_decoder and add_cross_attention"):
        model_class(Seq2SeqLM, config)


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")  # of every EncoderDecoderModel
@pytest.mark.parametrize("model_type", CONFIGS)
def test_decoder_inputs_and_loss_are_those_of_transformers(model_type: str) -> None:
    """As its collator and the model's own forward make them. FSMT's own shift would write padding into the labels."""
    config = tiny(model_type)
    task, model = make_task(config), build(config)
    read: list[torch.Tensor] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0]), with_kwargs=True
    )
    given = collated(model)
    labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(item["labels"]) for item in samples()], True, IGNORED)
    expected = model(**{**given, "labels": labels.clone()}).loss
    batch = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], "labels": labels.clone()}
    loss = task.loss_sum(model, batch) / task.count(batch)
    assert len(read) == 2
    assert torch.equal(read[1], read[0])
    assert torch.equal(batch["labels"], labels)
    torch.testing.assert_close(loss, expected)


# -- languages ---------------------------------------------------------------------------------------------------------

TEXTS = ["the cat sat on the mat", "le chat est assis", "a dog and a cat", "un chien et un chat"]


def vocabulary(model: Any, trainer: Any) -> dict[str, Any]:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(TEXTS, trainer)
    return dict(json.loads(tokenizer.to_str())["model"])


NUM_NEW = 8
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def nllb_tokenizer(**languages: str) -> Any:
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False)
    made = vocabulary(tokenizers.models.BPE(unk_token="<unk>"), trainer)
    return NllbTokenizer(vocab=made["vocab"], merges=[*map(tuple, made["merges"])], **languages)


def mbart_tokenizer(**languages: str) -> Any:
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=50, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made = vocabulary(tokenizers.models.Unigram(), trainer)
    return MBartTokenizer(vocab=[*map(tuple, made["vocab"])], **languages)


@dataclass(frozen=True)
class Multilingual:
    """A tokenizer that marks texts with their language, and how plain transformers starts to write in one."""

    model_type: str
    tokenizer: Callable[..., Any]
    languages: tuple[str, str]
    start: Callable[[Any, str], dict[str, int]]


def forced(tokenizer: Any, language: str) -> dict[str, int]:
    return {"forced_bos_token_id": tokenizer.convert_tokens_to_ids(language)}


def started(tokenizer: Any, language: str) -> dict[str, int]:
    return {"decoder_start_token_id": tokenizer.convert_tokens_to_ids(language)}


MULTILINGUAL = [
    Multilingual("m2m_100", nllb_tokenizer, ("eng_Latn", "fra_Latn"), forced),
    Multilingual("nllb-moe", nllb_tokenizer, ("eng_Latn", "fra_Latn"), forced),
    Multilingual("mbart", mbart_tokenizer, ("en_XX", "fr_XX"), started),
]


@pytest.mark.parametrize("case", MULTILINGUAL, ids=lambda case: case.model_type)
def test_targets_are_in_the_target_language(case: Multilingual, tmp_path: Path) -> None:
    source, target = case.languages
    plain = case.tokenizer(src_lang=source, tgt_lang=target)
    plain.save_pretrained(tmp_path)
    task = Seq2SeqLM(DataSettings(train="none"), load_tokenizer(str(tmp_path)), {})
    [sample] = task.encode([{"source": TEXTS[0], "target": TEXTS[1]}])
    assert sample["input_ids"].tolist() == plain(TEXTS[0])["input_ids"]
    assert sample["labels"].tolist() == plain(text_target=TEXTS[1])["input_ids"]
    assert plain.convert_tokens_to_ids(target) in sample["labels"]
    assert plain.convert_tokens_to_ids(source) not in sample["labels"]


@pytest.mark.parametrize("case", MULTILINGUAL, ids=lambda case: case.model_type)
def test_no_target_language_is_refused(case: Multilingual) -> None:
    """The tokenizer itself would mark the targets with the language of the sources."""
    tokenizer = case.tokenizer(src_lang=case.languages[0])
    task = Seq2SeqLM(DataSettings(train="none"), Tokenizer(tokenizer), {})
    with pytest.raises(ConfigError, match="has no language of targets"):
        [*task.encode([{"source": TEXTS[0], "target": TEXTS[1]}])]


@pytest.mark.parametrize("case", MULTILINGUAL, ids=lambda case: case.model_type)
def test_generates_in_the_target_language(case: Multilingual) -> None:
    source, target = case.languages
    tokenizer = case.tokenizer(src_lang=source, tgt_lang=target)
    model = build(tiny(case.model_type, vocab_size=len(tokenizer), decoder_start_token_id=END))
    task = Seq2SeqLM(DataSettings(train="none", max_target_length=NUM_NEW), Tokenizer(tokenizer), {})
    records = [{"source": text} for text in TEXTS]
    for record, predicted in zip(records, task.predict(model, records), strict=True):
        given = tokenizer(record["source"], return_tensors="pt")
        start = case.start(tokenizer, target)
        [expected] = model.generate(**given, **start, do_sample=False, max_length=1 + NUM_NEW)
        assert predicted["target"] == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("case", MULTILINGUAL, ids=lambda case: case.model_type)
def test_languages_can_be_set(case: Multilingual, tmp_path: Path) -> None:
    """Samples are those of a tokenizer that was loaded with them, and the published model writes in the target's."""
    source, target = case.languages[::-1]
    case.tokenizer().save_pretrained(tmp_path / "model")
    build(tiny(case.model_type, vocab_size=len(case.tokenizer()), decoder_start_token_id=END)).save_pretrained(
        tmp_path / "model"
    )
    rows = [{"source": TEXTS[1], "target": TEXTS[0]}, {"source": TEXTS[3], "target": TEXTS[2]}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "model": {"path": str(tmp_path / "model"), "config": None, "tokenizer": None, "task": "seq2seq-lm"},
        "data": {"max_length": 20, "eval": None, "source_language": source, "target_language": target},
    }
    storage = LocalStorage(tmp_path / "store")
    file = str(tmp_path / "rows.jsonl")
    config = tiny_config("languages", storage.url, file, sections=sections, eval_every=None)
    prepared = prepare(config, storage)
    task = Seq2SeqLM(config.data, prepared.tokenizer(storage), prepared.facts)
    model: Any
    model, files = build_model(config.model, task, task.tokenizer, 3, fresh=True)

    plain: Any = type(case.tokenizer()).from_pretrained(tmp_path / "model", src_lang=source, tgt_lang=target)
    samples = prepared.split(storage, "train").take(range(4))
    expected = plain([row["source"] for row in rows], text_target=[row["target"] for row in rows])
    assert [item["input_ids"].tolist() for item in samples] == expected["input_ids"]
    assert [item["labels"].tolist() for item in samples] == expected["labels"]
    batch = task.collate(samples, [])
    model.eval()
    torch.testing.assert_close(task.loss_sum(model, batch) / task.count(batch), model(**batch).loss)

    (tmp_path / "published").mkdir()
    for name, data in files.items():
        (tmp_path / "published" / name).write_bytes(data)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "published")
    given = plain(TEXTS[1], return_tensors="pt")
    start = case.start(plain, target)
    [expected] = model.generate(**given, **start, do_sample=False, max_length=NUM_NEW)
    [found] = model.generate(**given, generation_config=generation, do_sample=False, max_length=NUM_NEW)
    assert found.tolist() == expected.tolist()
    assert plain.convert_tokens_to_ids(target) in found.tolist()[:2]


def test_an_unknown_language_is_refused() -> None:
    data = DataSettings(train="none", source_language="eng_Latin", target_language="fra_Latn")
    with pytest.raises(ConfigError, match=r"data\.source_language 'eng_Latin' is not a .*did you mean 'eng_Latn'"):
        Seq2SeqLM(data, Tokenizer(nllb_tokenizer()), {})
    with pytest.raises(ConfigError, match=r"data\.source_language is set, and Padding does not mark texts"):
        Seq2SeqLM(data, Tokenizer(Padding()), {})


@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.parametrize("model_type", CONFIGS)
def test_no_token_that_the_decoder_starts_with_is_refused(model_type: str) -> None:
    """Just for the types whose own forward then fails."""
    config = tiny(model_type)
    try:
        config.decoder_start_token_id = None
    except StrictDataclassFieldValidationError:
        return  # transformers itself does not load such a configuration
    ids = torch.tensor([[5, 6, END]])
    try:
        build(config)(input_ids=ids, labels=ids.clone())
    except (TypeError, ValueError, AssertionError):
        with pytest.raises(ConfigError, match=f"the {model_type} model has no decoder_start_token_id"):
            make_task(config)
    else:
        make_task(config)


def test_a_multilingual_model_with_another_tokenizer_is_trained(tmp_path: Path) -> None:
    """M2M-100 with a tokenizer that marks no language; some of its layers are left out at random in training."""
    tokenizer = train_bpe(iter(TEXTS * 9), 300, Seq2SeqLM.special_tokens, Seq2SeqLM.template).inner
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": END, "decoder_start_token_id": END}
    build(tiny("m2m_100", vocab_size=len(tokenizer), **special)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"source": TEXTS[number], "target": TEXTS[number + 1]} for number in (0, 2)] * 8
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections = {
        "model": {"path": str(tmp_path / "model"), "config": None, "tokenizer": None, "task": "seq2seq-lm"},
        "data": {"max_length": 20, "eval": None},
    }
    storage = LocalStorage(tmp_path / "store")
    file = str(tmp_path / "rows.jsonl")
    config = tiny_config("m2m", storage.url, file, sections=sections, eval_every=None)
    prepared = prepare(config, storage)
    task = Seq2SeqLM(config.data, prepared.tokenizer(storage), prepared.facts)
    model = transformers.M2M100ForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    batch = task.collate(prepared.split(storage, "train").take(range(4)), [])
    torch.testing.assert_close(task.loss_sum(model, batch) / task.count(batch), model(**batch).loss)
    declared = config.model_dump(mode="json", exclude_defaults=True)
    assert run_group(Assignment(config, declared, "only", prepared), storage, 2)[0].outcome is Outcome.DONE
