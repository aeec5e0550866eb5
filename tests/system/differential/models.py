"""Tiny pretrained models with the tokenizers of their families, saved by plain transformers."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SIZE = 400
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
GROUPED = {**WIDTHS, "num_key_value_heads": 1}
BART = {
    "d_model": 32,
    **{f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")},
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
GPT = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}
TURNS = (
    "{% if tools %}<tools>{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def texts() -> list[str]:
    return [line for page in pydoc_data.topics.topics.values() for line in page.splitlines() if line.strip()][:3000]


def _templated(inner: Tokenizer, single: str, pair: str) -> Tokenizer:
    ids = [(token, inner.token_to_id(token)) for token in {*single.split(), *pair.split()} - {"$A", "$B", "$B:1"}]
    ids = [(token.removesuffix(":1"), inner.token_to_id(token.removesuffix(":1"))) for token, _ in ids]
    inner.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(dict(ids).items())
    )
    return inner


def _byte_level(special: list[str]) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts(),
        trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return inner


def _sentencepiece(special: list[str], unknown: str) -> Tokenizer:
    inner = Tokenizer(models.Unigram())
    inner.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.train_from_iterator(
        texts(),
        trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=special, unk_token=unknown, show_progress=False),
    )
    return inner


def word_piece() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.train_from_iterator(
        texts(), trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=special, show_progress=False)
    )
    _templated(inner, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def roberta() -> Any:
    inner = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    inner = _templated(inner, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", **names
    )


def gpt2() -> Any:
    """Neither a padding token nor special tokens around a text."""
    inner = _byte_level(["<|endoftext|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


def llama() -> Any:
    """A text begins with `<s>`; no padding token; words begin with a space."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    inner.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, show_progress=False)
    )
    _templated(inner, "<s> $A", "<s> $A <s> $B")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def qwen() -> Any:
    """Padding on the left, with a token of its own; no token begins a text."""
    inner = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )


def opt() -> Any:
    """`</s>` begins a text, and ends it in a batch of packed documents."""
    inner = _templated(_byte_level(["<s>", "<pad>", "</s>", "<unk>"]), "</s> $A", "</s> $A </s> $B")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def t5() -> Any:
    inner = _templated(_sentencepiece(["<pad>", "</s>", "<unk>"], "<unk>"), "$A </s>", "$A </s> $B </s>")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def albert() -> Any:
    inner = _sentencepiece(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], "<unk>")
    _templated(inner, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    names = {"bos_token": "[CLS]", "cls_token": "[CLS]", "eos_token": "[SEP]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **names,
    )


def xlnet() -> Any:
    inner = _sentencepiece(["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>"], "<unk>")
    _templated(inner, "$A <sep> <cls>", "$A <sep> $B:1 <sep>:1 <cls>:1")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        sep_token="<sep>",
        cls_token="<cls>",
        pad_token="<pad>",
        mask_token="<mask>",
        padding_side="left",
    )


ENCODER = ("classes", "pairs", "multi-label", "regression", "tags", "answers", "masked-lm", "choices")
DECODER = ("classes", "multi-label", "regression", "tags", "causal-lm", "chat", "marked chat")


@dataclass(frozen=True)
class Model:
    """A kind of model: its type, its tokenizer, the tasks to compare, and settings."""

    model_type: str
    tokenizer: Callable[[], Any]
    kinds: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


XLNET = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48}
OPT = {**WIDTHS, "ffn_dim": 48, "word_embed_proj_dim": 32}
TIED = {**GROUPED, "tie_word_embeddings": True}
GATED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BERT_LIKE = {**WIDTHS, "max_position_embeddings": 128}
MODELS = {
    "bert": Model("bert", word_piece, ENCODER, BERT_LIKE),
    "distilbert": Model(
        "distilbert",
        word_piece,
        tuple(kind for kind in ENCODER if kind != "pairs"),
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    ),
    "electra": Model("electra", word_piece, ENCODER, {**BERT_LIKE, "embedding_size": 16}),
    "roberta": Model("roberta", roberta, ENCODER, {**BERT_LIKE, "type_vocab_size": 1}),
    "xlm-roberta": Model("xlm-roberta", albert, ENCODER, {**BERT_LIKE, "type_vocab_size": 2}),
    "albert": Model("albert", albert, ENCODER, {**BERT_LIKE, "embedding_size": 16}),
    "deberta-v2": Model("deberta-v2", albert, ENCODER, {**BERT_LIKE, "type_vocab_size": 2}),
    "modernbert": Model(
        "modernbert",
        roberta,
        tuple(kind for kind in ENCODER if kind != "regression"),
        {**BERT_LIKE, "global_attn_every_n_layers": 1},
    ),
    "xlnet": Model("xlnet", xlnet, ("classes", "multi-label", "regression"), XLNET),
    "gpt2": Model("gpt2", gpt2, DECODER, GPT),
    "gpt_neox": Model("gpt_neox", gpt2, DECODER, {**WIDTHS, "max_position_embeddings": 128}),
    "bloom": Model("bloom", qwen, DECODER, {"hidden_size": 32, "n_layer": 1, "n_head": 2}),
    "opt": Model("opt", opt, ("classes", "regression", "causal-lm", "chat"), OPT),
    "llama": Model("llama", llama, DECODER, {**GROUPED, "tie_word_embeddings": False}),
    "llama, tied, padding is token 0": Model("llama", llama, DECODER, {**TIED, "pad_token_id": 0}),
    "qwen2": Model("qwen2", qwen, DECODER, GROUPED),
    "gemma2": Model("gemma2", llama, DECODER, {**GROUPED, "head_dim": 16, "attn_implementation": "eager"}),
    "mixtral": Model("mixtral", llama, ("causal-lm", "chat"), {**GROUPED, "num_local_experts": 2}),
    "t5": Model("t5", t5, ("seq2seq", "classes", "tags"), T5),
    "t5, gated, untied": Model("t5", t5, ("seq2seq",), GATED),
    "bart": Model("bart", roberta, ("seq2seq", "classes", "pairs"), BART),
    "m2m_100": Model("m2m_100", roberta, ("seq2seq",), {**BART, "encoder_layerdrop": 0, "decoder_layerdrop": 0}),
    "pegasus": Model("pegasus", t5, ("seq2seq",), BART),
}  # fmt: skip

#: The class with the head, by kind of rows.
HEADS = {
    **dict.fromkeys(("classes", "pairs", "multi-label", "regression"), "AutoModelForSequenceClassification"),
    "tags": "AutoModelForTokenClassification",
    "answers": "AutoModelForQuestionAnswering",
    "masked-lm": "AutoModelForMaskedLM",
    "choices": "AutoModelForMultipleChoice",
    **dict.fromkeys(("causal-lm", "chat", "marked chat"), "AutoModelForCausalLM"),
    "seq2seq": "AutoModelForSeq2SeqLM",
}
#: Names of the classes that the model was trained with, by kind of rows; not in the order of the alphabet.
LABELS = {
    "classes": ["short", "long"],
    "pairs": ["1", "0"],
    "multi-label": ["value", "class", "object", "name"],
    "regression": ["score"],
    "tags": ["word", "name"],
}


def without_dropout(config: Any) -> Any:
    """Set every probability of dropout to zero: its random numbers are no part of the comparison."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name or name.endswith("layerdrop")):
            setattr(config, name, 0.0)
    config.classifier_dropout = 0.0  # GPT-2's head for tokens has its own default where this is not set
    return config


@cache
def tokenizer_of(maker: Callable[[], Any]) -> Any:
    return maker()


def save_model(name: str, kind: str, folder: Path) -> Path:
    """Save the model of this name with the head for this kind of rows. Its weights are larger than new ones."""
    model, tokenizer = MODELS[name], tokenizer_of(MODELS[name].tokenizer)
    special = {f"{item}_token_id": getattr(tokenizer, f"{item}_token_id") for item in ("bos", "eos", "pad")}
    config = transformers.AutoConfig.for_model(
        model.model_type, **{"vocab_size": SIZE + 8, **special, **model.settings}
    )
    without_dropout(config)
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = config.eos_token_id
    if kind in LABELS:
        config.id2label = dict(enumerate(LABELS[kind]))
        config.label2id = {label: index for index, label in enumerate(LABELS[kind])}
    torch.manual_seed(7)
    built = getattr(transformers, HEADS[kind]).from_config(config)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    built.save_pretrained(folder)
    if kind in ("chat", "marked chat"):
        tokenizer.chat_template = TURNS if kind == "chat" else MARKED
    tokenizer.save_pretrained(folder)
    tokenizer.chat_template = None
    return folder
