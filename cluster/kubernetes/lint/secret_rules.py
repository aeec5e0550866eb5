"""Credentials written in a manifest where only their secret should be named. Pure; no message repeats a value."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from outlast.cluster.kubernetes.accessors import LintComplaint, containers, env_variables, mapping, strings

_SECRET_WORDS = frozenset({"SECRET", "PASSWORD", "PASSWD", "TOKEN", "CREDENTIAL", "CREDENTIALS", "APIKEY"})
#: Words that make the word KEY after them a credential.
_KEY_PREFIXES = frozenset({"ACCESS", "API", "PRIVATE", "SECRET"})
_PATH_WORDS = frozenset({"PATH", "FILE", "DIR"})
#: Words that make the word TOKEN after them a vocabulary entry, as in `pad_token`.
_TOKEN_PREFIXES = frozenset({"BOS", "CLS", "EOS", "IMAGE", "MASK", "PAD", "SEP", "UNK"})
_PLAIN = re.compile(r"true|false|yes|no|on|off|null|none|[-+]?[\d._]+(e[-+]?\d+)?", re.IGNORECASE)
_INLINE = re.compile(r"""(?:^|[\s;&|("'])(?:-{1,2})?([A-Za-z][\w-]*)=["']?([^\s"';&|)]+)""")
_ADVICE = "name a secret instead (envFrom, or valueFrom.secretKeyRef)"


def is_credential(name: str, value: Any) -> bool:
    """Return whether a variable holds a credential in plain text.

    Only whole words of the name count, so `MAX_NEW_TOKENS` is not a credential. Neither is a value as written that is a
    number, a word such as `true`, or a reference to another variable.
    """
    parts = [part for part in re.split(r"[^A-Z0-9]+", name.upper()) if part]
    if not isinstance(value, str) or not value or value.startswith("$") or _PLAIN.fullmatch(value):
        return False
    if _PATH_WORDS & set(parts) or (parts[-1:] == ["CREDENTIALS"] and value.startswith("/")):
        return False
    return any(
        (word in _SECRET_WORDS and not (word == "TOKEN" and before in _TOKEN_PREFIXES))
        or (word == "KEY" and before in _KEY_PREFIXES)
        for before, word in itertools.pairwise(["", *parts])
    )


def inline_secrets(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield credentials whose value is in the RayJob."""
    for where, _, container in containers(job):
        for name, value in env_variables(container).items():
            if is_credential(name, value):
                yield where, f"{name} is in plain text; {_ADVICE}"
        for name in _inline(" ".join([*strings(container, "command"), *strings(container, "args")])):
            yield where, f"{name} is in plain text in the command; {_ADVICE}"
    spec = mapping(job, "spec")
    for name in _inline(str(spec.get("entrypoint", ""))):
        yield "spec.entrypoint", f"{name} is in plain text; {_ADVICE}"
    for name, value in mapping(_parsed(spec.get("runtimeEnvYAML")), "env_vars").items():
        if is_credential(str(name), value):
            yield "spec.runtimeEnvYAML", f"{name} is in plain text; {_ADVICE}"


def config_map_complaints(config_map: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield apparent credentials in a ConfigMap, or in the YAML that it holds: it is not protected."""
    for key, value in mapping(config_map, "data").items():
        if is_credential(str(key), value):
            yield f"data.{key}", "looks like a credential, which belongs in a Secret, not in a ConfigMap"
        if str(key).endswith((".yaml", ".yml")):
            for path in _credential_paths(_parsed(value)):
                advice = "write ${env:NAME} instead, and set NAME by a secret"
                yield f"data.{key}", f"{path} looks like a credential; {advice}"


def _inline(command: str) -> list[str]:
    """Return the names of credentials that a command line sets, as in `KEY=value`."""
    return [name for name, value in _INLINE.findall(command) if is_credential(name, value)]


def _credential_paths(value: Any, path: tuple[str, ...] = (), within: tuple[int, ...] = ()) -> Iterator[str]:
    """Yield the key paths of apparent credentials in nested settings.

    `within` are the ids of those around `value`, which an alias of YAML may put into themselves.
    """
    if id(value) in within:
        return
    within = (*within, id(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            if is_credential(str(key), item):
                yield ".".join((*path, str(key)))
            yield from _credential_paths(item, (*path, str(key)), within)
    for number, item in enumerate(value if isinstance(value, list) else []):
        yield from _credential_paths(item, (*path, str(number)), within)


def _parsed(text: Any) -> Any:
    try:
        return yaml.safe_load(text) if isinstance(text, str) else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
