"""Old-style vocabulary files, made from a `tokenizer.json`: pure, and without the library.

They hold the entries and nothing else: how a text is normalized and split before is up to the class that reads them
(`BertTokenizer`, `GPT2Tokenizer`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from outlast.checkpointing.errors import ConfigError

TOKENIZER = "tokenizer.json"


def slow_tokenizer_files(tokenizer: bytes) -> dict[str, bytes]:
    """The files by name: `vocab.txt` (WordPiece), or `vocab.json` and `merges.txt` (BPE); and `added_tokens.json`
    where there are tokens that those do not hold.

    Args:
        tokenizer: The content of tokenizer.json.

    Raises:
        ConfigError: There are no such files for this kind of tokenizer.
    """
    whole = json.loads(tokenizer)
    model = whole["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind == "WordPiece":
        files = {"vocab.txt": _lines(_by_number(model["vocab"]))}
    elif kind == "BPE":
        merges = [item if isinstance(item, str) else " ".join(item) for item in model["merges"]]
        vocab = {token: model["vocab"][token] for token in sorted(model["vocab"], key=model["vocab"].__getitem__)}
        files = {"vocab.json": _json(vocab), "merges.txt": _lines(["#version: 0.2", *merges])}
    else:
        raise ConfigError(
            f"{TOKENIZER} holds a {kind} model, for which there are no old-style vocabulary files",
            hint=f"use {TOKENIZER} itself, with AutoTokenizer",
        )
    added = {item["content"]: item["id"] for item in whole.get("added_tokens") or ()}
    if missing := {token: number for token, number in added.items() if token not in model["vocab"]}:
        files["added_tokens.json"] = _json(missing)
    return files


def _by_number(vocab: Mapping[str, int]) -> list[str]:
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ConfigError(f"the vocabulary of {TOKENIZER} has holes, which vocab.txt cannot say")
    return tokens


def _lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
