"""Credentials that are written down where they should only be named. Pure; nothing here repeats a value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from outlast.cluster.kubernetes.accessors import LintComplaint, containers, mapping, variables, words

_WORDS = frozenset({"SECRET", "PASSWORD", "PASSWD", "TOKEN", "CREDENTIAL", "CREDENTIALS", "APIKEY"})
#: What makes a credential of the word KEY after it.
_KEYS = frozenset({"ACCESS", "API", "PRIVATE", "SECRET"})
_PLACES = frozenset({"PATH", "FILE", "DIR"})
#: What makes an entry of a vocabulary of the word TOKEN after it, as in `pad_token`.
_VOCABULARY = frozenset({"BOS", "CLS", "EOS", "IMAGE", "MASK", "PAD", "SEP", "UNK"})
_PLAIN = re.compile(r"true|false|yes|no|on|off|null|none|[-+]?[\d._]+(e[-+]?\d+)?", re.IGNORECASE)
_INLINE = re.compile(r"""(?:^|[\s;&|("'])(?:-{1,2})?([A-Za-z][\w-]*)=["']?([^\s"';&|)]+)""")
_ADVICE = "name a secret instead (envFrom, or valueFrom.secretKeyRef)"


def is_credential(name: str, value: Any) -> bool:
    """Whether a variable is written down that should not be.

    Args:
        name: Its name; whole words of it count, so `MAX_NEW_TOKENS` is none.
        value: Its value as written. A number, a word such as `true`, and a reference to another variable are none.
    """
    parts = [part for part in re.split(r"[^A-Z0-9]+", name.upper()) if part]
    if not isinstance(value, str) or not value or value.startswith("$") or _PLAIN.fullmatch(value):
        return False
    if _PLACES & set(parts) or (parts[-1:] == ["CREDENTIALS"] and value.startswith("/")):
        return False
    pairs = [*zip(["", *parts], parts, strict=False)]
    return any(
        (word in _WORDS and not (word == "TOKEN" and before in _VOCABULARY)) or (word == "KEY" and before in _KEYS)
        for before, word in pairs
    )


def secrets_written_down(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Credentials whose value stands in the RayJob."""
    for where, _, container in containers(job):
        for name, value in variables(container).items():
            if is_credential(name, value):
                yield where, f"{name} is written down; {_ADVICE}"
        for name in _inline(" ".join([*words(container, "command"), *words(container, "args")])):
            yield where, f"{name} is written down in the command; {_ADVICE}"
    spec = mapping(job, "spec")
    for name in _inline(str(spec.get("entrypoint", ""))):
        yield "spec.entrypoint", f"{name} is written down; {_ADVICE}"
    for name, value in mapping(_parsed(spec.get("runtimeEnvYAML")), "env_vars").items():
        if is_credential(str(name), value):
            yield "spec.runtimeEnvYAML", f"{name} is written down; {_ADVICE}"


def config_map_complaints(config_map: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """What looks like a credential in a ConfigMap, or in the YAML that it holds: anybody may read it."""
    for key, value in mapping(config_map, "data").items():
        if is_credential(str(key), value):
            yield f"data.{key}", "looks like a credential; a ConfigMap is no place for one, a Secret is"
        if str(key).endswith((".yaml", ".yml")):
            for place in _places(_parsed(value)):
                yield (
                    f"data.{key}",
                    f"{place} looks like a credential; write ${{env:NAME}} there, and give NAME by a secret",
                )


def _inline(command: str) -> list[str]:
    """Names of credentials that a command line sets, as in `KEY=value`."""
    return [name for name, value in _INLINE.findall(command) if is_credential(name, value)]


def _places(value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Where in nested settings something looks like a credential."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if is_credential(str(key), item):
                yield ".".join((*path, str(key)))
            yield from _places(item, (*path, str(key)))
    for number, item in enumerate(value if isinstance(value, list) else []):
        yield from _places(item, (*path, str(number)))


def _parsed(text: Any) -> Any:
    try:
        return yaml.safe_load(text) if isinstance(text, str) else None
    except (yaml.YAMLError, ValueError):
        return None
