"""Redaction of credentials in text that is written or printed: errors, events, records, reports, output.

Redacted are values of secret-looking environment variables, passwords inside any environment variable, `user:password@`
and secret query parameters of URLs, private keys, and tokens of a known shape. A secret of no known shape that no
variable of this process holds cannot be recognised. What a run is started with must never pass through here, so that a
redacted value is never used.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

REDACTED = "<redacted>"
_SECRET = (
    r"key|token(?!iz)|secret|passw|passphrase|passcode|credential|(?:^|_)(?:pass|pwd|pat|auth|creds?|jwt|bearer|cookie)(?:_|$)"
    r"|authorization|(?:db|ssh)pass"
)
_SECRET_NAME = re.compile(_SECRET, re.IGNORECASE)
#: Shorter values are no secrets, and words and numbers are none below the second length: they occur in any text.
_SECRET_LENGTH, _WORD_LENGTH = 6, 16
#: Bounds keep the time linear, whatever a text holds.
_LONGEST = 400
_CHUNK = r"[^\s\"'<>]"
_URL_PASSWORD = re.compile(rf"(://)([^\s/:@?#\"'<>]{{0,99}}):(?!\d+[/?#])({_CHUNK}{{1,{_LONGEST}}})@(?=[^\s/@])")
_PARAMETER = (
    r"[\w.-]{0,40}(?:secret|token(?!iz)|passw|pwd|signature|credential|api_?key|access_?key|account_?key|auth(?!or))"
    r"[\w.-]{0,40}"
)
_QUERY = re.compile(rf"([?&;#](?:{_PARAMETER}|key|sig)=)([^&;\s\"'<>#]+)", re.IGNORECASE)
#: In the environment only, whose texts are short: there a password may have any signs but white space, and any length.
_ANY_URL_PASSWORD = re.compile(r"://[^\s/:@?#]*:(\S+)@(?=[^\s@])")
_PAIR = re.compile(r"\b(?:password|passwd|pwd|accountkey|sharedaccesskey)\s*[=:]\s*[\"']?([^\s;&\"']+)", re.IGNORECASE)
_HEADER = re.compile(r"(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:\w+\s+)?|\bbearer\s+)[\w~+/.=-]{8,}", re.IGNORECASE)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|sk-[\w-]{20,}|xox[a-z]-[\w-]{10,}|AIza[\w-]{35}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*|(?:npm|pypi)[_-][\w-]{32,})"
)


def redact(text: str) -> str:
    """Replace each credential in a text by the name of its variable, or by `<redacted>`."""
    if len(text) < _SECRET_LENGTH:
        return text
    for value, name in sorted(_environment_secrets().items(), key=lambda item: -len(item[0])):
        if value in text:
            text = _replace(text, value, f"<{name}>")
    text = _PRIVATE_KEY.sub(REDACTED, text)
    text = _URL_PASSWORD.sub(rf"\1{REDACTED}@", text)
    text = _QUERY.sub(rf"\1{REDACTED}", text)
    text = _HEADER.sub(rf"\1{REDACTED}", text)
    return _TOKEN.sub(REDACTED, text)


def redact_json(value: Any) -> Any:
    """Copy a value of JSON with every text redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(key) if isinstance(key, str) else key: redact_json(item) for key, item in value.items()}
    return [redact_json(item) for item in value] if isinstance(value, list | tuple) else value


def has_private_key(text: str) -> bool:
    """Check whether a text holds a private key, such as a service account's file."""
    return bool(_PRIVATE_KEY.search(text))


def is_secret_name(name: str) -> bool:
    """Check whether a variable or setting of this name probably holds a credential."""
    return bool(_SECRET_NAME.search(name))


def _environment_secrets() -> dict[str, str]:
    """Return the secret values of the environment as it is now, with the names of their variables."""
    names = list(os.environ)  # atomic; another thread may change the environment
    return {value: name for name in names for value in _secrets_of(name, os.environ.get(name, ""))}


@lru_cache(maxsize=4096)
def _secrets_of(name: str, value: str) -> tuple[str, ...]:
    found = {value} if is_secret_name(name) and not os.path.exists(value) else set()
    found |= {match[1] for match in _ANY_URL_PASSWORD.finditer(value)} | set(_PAIR.findall(value))
    found |= {match[2] for match in _QUERY.finditer(value)}
    found |= {line for item in found for line in item.splitlines() if len(line) >= _WORD_LENGTH}
    return tuple(item for item in _forms(found) if _is_secret_value(item))


def _forms(values: set[str]) -> Iterator[str]:
    """Yield each value as it is, and as it stands in a URL or outside of one, in JSON, and in Python's notation."""
    for value in sorted(values | {value.strip() for value in values}):
        quoted = (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1])
        yield from dict.fromkeys((value, quote(value, safe=""), unquote(value), *quoted))


def _is_secret_value(value: str) -> bool:
    is_word = value.isalpha() or value.replace(".", "").isdigit()
    return len(value) >= (_WORD_LENGTH if is_word else _SECRET_LENGTH)


def _replace(text: str, value: str, name: str) -> str:
    if len(value) >= _WORD_LENGTH:
        return text.replace(value, name)
    return re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", lambda _: name, text)  # not inside of a longer word
