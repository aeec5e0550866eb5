"""The user's files that are sent to a cluster or recorded: code and settings, no data and no credentials.

Left out is what `.gitignore` and `.outlastignore` name, what is known to hold credentials, and what a link outside the
folder leads to. Nothing here reads a file for another purpose than this choice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from outlast.checkpointing.redaction import has_private_key, redact

if TYPE_CHECKING:  # needed where code is sent; a cluster's image may lack it
    from pathspec import GitIgnoreSpec

    _Rule = tuple[Path, GitIgnoreSpec]

IGNORE_FILES = (".gitignore", ".outlastignore")
_SUFFIXES = (".py", ".json", ".yaml", ".yml", ".toml", ".txt")
#: Files of these names hold credentials, in any case. Modules are exempt: code fetches credentials by such names.
CREDENTIAL_FILES = (
    *(".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "id_rsa*", "id_dsa*"),
    *("id_ecdsa*", "id_ed25519*", ".netrc", "_netrc", ".pgpass", ".git-credentials", ".npmrc", ".pypirc", ".htpasswd"),
    *("credentials", "credentials.*", "*credentials*.json", "client_secret*.json", "service?account*.json"),
    *("secret.*", "secrets.*", "*_secret.*", "*_secrets.*", "token", "token.*", "*_token.*", "*-token.*"),
    *("kubeconfig", "kubeconfig.*", "*.kubeconfig", "password*.txt", "kaggle.json", "auth.json"),
    *(".aws", ".ssh", ".kube", ".gnupg", ".docker"),
)
_NAMED_CREDENTIALS = "holds credentials by its name"
_SCANNED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class CodeFiles:
    """The files of a folder, relative to it."""

    kept: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  #: by an ignore file; a folder stands for its files
    refused: dict[str, str] = field(default_factory=dict)  #: each with the reason
    suspicious: list[str] = field(default_factory=list)  #: kept, although their text seems to contain a credential


def is_credential_file(name: str) -> bool:
    """Check whether a file or folder of this name is known to hold credentials."""
    lowered = name.lower()
    return not lowered.endswith(".py") and any(fnmatchcase(lowered, pattern) for pattern in CREDENTIAL_FILES)


def select_code(folder: Path) -> CodeFiles:
    """Choose the files of a folder that may be sent. Raises OSError if it cannot be read."""
    root = folder.resolve(strict=True)
    found = CodeFiles()
    above = [parent for parent in root.parents if _is_in_repository(parent)]
    rules = [rule for parent in reversed(above) for rule in _rules_of(parent)]
    _select(root, root, "", (), rules, found)
    for listing in (found.kept, found.ignored, found.suspicious):
        listing.sort()
    return found


def _select(
    root: Path, folder: Path, prefix: str, above: tuple[Path, ...], rules: Sequence[_Rule], found: CodeFiles
) -> None:
    """Sort the files of a folder into `found`; `above` are the folders around it, which a link must not enter again."""
    rules = [*rules, *_rules_of(folder)]
    for item in sorted(os.scandir(folder), key=lambda item: item.name):
        path, name = Path(item.path), f"{prefix}{item.name}"
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            found.refused[name] = "is a broken link"
            continue
        is_link = item.is_symlink()
        if is_link and not target.is_relative_to(root):
            found.refused[name] = "is a link out of the folder"
        elif any(map(is_credential_file, (item.name, *(target.relative_to(root).parts if is_link else ())))):
            found.refused[name] = _NAMED_CREDENTIALS
        elif item.name.startswith(".") or item.name == "__pycache__":
            continue
        elif _is_ignored(path, rules, target.is_dir()) or (is_link and _is_ignored(target, rules, target.is_dir())):
            found.ignored.append(f"{name}/" if target.is_dir() else name)
        elif target.is_dir():
            if target in (folder, *above):
                found.refused[name] = "is a link to a folder around it"
            else:
                _select(root, target, f"{name}/", (*above, folder), rules, found)
        elif target.is_file() and name.endswith(_SUFFIXES):
            _check_content(target, name, found)


def _check_content(path: Path, name: str, found: CodeFiles) -> None:
    with path.open("rb") as file:
        text = file.read(_SCANNED_BYTES).decode(errors="replace")
    if has_private_key(text) and not name.endswith(".py"):
        found.refused[name] = "contains a private key"
        return
    found.kept.append(name)
    if redact(text) != text:
        found.suspicious.append(name)


def _is_in_repository(folder: Path) -> bool:
    """Check whether a git repository begins at or above a folder, so that its ignore file counts below."""
    return any((parent / ".git").exists() for parent in (folder, *folder.parents))


def _rules_of(folder: Path) -> Iterator[_Rule]:
    from pathspec import GitIgnoreSpec

    lines: list[str] = []
    for name in IGNORE_FILES:
        path = folder / name
        if path.is_file():
            lines += path.read_text(encoding="utf-8", errors="replace").splitlines()
    if lines:
        yield folder, GitIgnoreSpec.from_lines(lines)


def _is_ignored(path: Path, rules: Sequence[_Rule], is_folder: bool) -> bool:
    """Return what the nearest ignore file with a matching line decides."""
    for base, spec in reversed(rules):
        if path.is_relative_to(base):
            name = path.relative_to(base).as_posix() + ("/" if is_folder else "")
            if (decision := spec.check_file(name).include) is not None:
                return decision
    return False
