"""Vocabulary files of slow tokenizers, converted from a `tokenizer.json` without the tokenizers library.

They contain the entries only: how text is normalized and split is up to the class that reads them (`BertTokenizer`,
`GPT2Tokenizer`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from outlast.checkpointing.errors import ConfigError

TOKENIZER = "tokenizer.json"


def slow_tokenizer_files(tokenizer: bytes) -> dict[str, bytes]:
    """Convert the content of tokenizer.json. Raises ConfigError for kinds of tokenizers without such files.

    Returns by name `vocab.txt` (WordPiece), or `vocab.json` and `merges.txt` (BPE); and `added_tokens.json` for tokens
    that these lack.
    """
    content = json.loads(tokenizer)
    model = content["model"]
    model_type = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if model_type == "WordPiece":
        files = {"vocab.txt": _lines(_ordered_tokens(model["vocab"]))}
    elif model_type == "BPE":
        merges = [item if isinstance(item, str) else " ".join(item) for item in model["merges"]]
        vocab = {token: model["vocab"][token] for token in sorted(model["vocab"], key=model["vocab"].__getitem__)}
        files = {"vocab.json": _json(vocab), "merges.txt": _lines(["#version: 0.2", *merges])}
    else:
        raise ConfigError(
            f"{TOKENIZER} has a {model_type} model, for which there are no old-style vocabulary files",
            hint=f"use {TOKENIZER} itself, with AutoTokenizer",
        )
    added = {item["content"]: item["id"] for item in content.get("added_tokens") or ()}
    if missing := {token: number for token, number in added.items() if token not in model["vocab"]}:
        files["added_tokens.json"] = _json(missing)
    return files


def _ordered_tokens(vocab: Mapping[str, int]) -> list[str]:
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ConfigError(f"the vocabulary of {TOKENIZER} skips numbers, which vocab.txt cannot express")
    return tokens


def _lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
