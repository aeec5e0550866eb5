"""The user's files that are sent to a cluster or recorded: code and settings, no data and no credentials.

Left out is what `.gitignore` and `.outlastignore` name, what is known to hold credentials, what a link outside the
folder leads to, and what is no code: environments, caches, data. Nothing here reads a file for another purpose.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.redaction import has_private_key, redact

if TYPE_CHECKING:  # needed where code is sent; a cluster's image may lack it
    from pathspec import GitIgnoreSpec

    _Rule = tuple[str, Path, GitIgnoreSpec]

#: The first one that decides on a file counts, wherever the other one lies.
IGNORE_FILES = (".outlastignore", ".gitignore")
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
_NO_CODE = ("__pycache__", "node_modules", "site-packages", "venv")
#: Files that mark the folder of an environment, whatever its name.
_ENVIRONMENTS = ("pyvenv.cfg", "conda-meta")
_NAMED_CREDENTIALS = "holds credentials by its name"
_SCANNED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class CodeFiles:
    """The files of a folder, relative to it."""

    kept: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)  #: by an ignore file; a folder stands for its files
    refused: dict[str, str] = field(default_factory=dict)  #: each with the reason
    broken: dict[str, str] = field(default_factory=dict)  #: code by its name that cannot be read, with the reason
    no_code: Counter[str] = field(default_factory=Counter)  #: number of files by pattern; a folder stands for its files
    sizes: dict[str, int] = field(default_factory=dict)  #: bytes of each that is kept
    suspicious: list[str] = field(default_factory=list)  #: kept, although their text seems to contain a credential


def is_credential_file(name: str) -> bool:
    """Check whether a file or folder of this name is known to hold credentials."""
    lowered = name.lower()
    return not lowered.endswith(".py") and any(fnmatchcase(lowered, pattern) for pattern in CREDENTIAL_FILES)


def select_code(folder: Path) -> CodeFiles:
    """Choose the files of a folder that may be sent. Raises ConfigError if it cannot be read."""
    found = CodeFiles()
    try:
        root = folder.resolve(strict=True)
        above = [parent for parent in root.parents if _is_in_repository(parent)]
        rules = [rule for parent in reversed(above) for rule in _rules_of(parent)]
        _select(root, root, "", (), rules, found)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or "a loop of links"
        where = getattr(error, "filename", None) or folder
        hint = "name a directory of Python files, or leave out what cannot be read by .outlastignore"
        raise ConfigError(f"the code in {folder} cannot be read: {where}: {reason}", hint=hint) from error
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
            if not item.name.startswith(".") and not _is_ignored(path, rules, is_folder=False):
                (found.broken if name.endswith(".py") else found.refused)[name] = "is a broken link"
            continue
        is_link, is_folder = item.is_symlink(), target.is_dir()
        shown = f"{name}/" if is_folder else name
        if is_link and not target.is_relative_to(root):
            found.refused[name] = "is a link out of the folder"
        elif any(map(is_credential_file, (item.name, *(target.relative_to(root).parts if is_link else ())))):
            found.refused[name] = _NAMED_CREDENTIALS
        elif item.name.startswith(".") or (is_folder and _is_no_code(target)):
            found.no_code[shown] += 1
        elif _is_ignored(path, rules, is_folder) or (is_link and _is_ignored(target, rules, is_folder)):
            found.ignored.append(shown)
        elif not _is_utf8(item.name):
            found.refused[name] = "has a name that is not UTF-8"
        elif is_folder and target in (folder, *above):
            found.refused[name] = "is a link to a folder around it"
        elif is_folder:
            _select(root, target, shown, (*above, folder), rules, found)
        elif not name.endswith(_SUFFIXES):
            found.no_code[f"{prefix}*{path.suffix}" if path.suffix else name] += 1
        elif target.is_file():
            _check_content(target, name, found)
        else:
            found.broken[name] = "is no file, but a pipe, a socket or a device"


def _is_no_code(folder: Path) -> bool:
    """Check whether a folder holds an environment or a cache."""
    return folder.name in _NO_CODE or any((folder / marker).exists() for marker in _ENVIRONMENTS)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_content(path: Path, name: str, found: CodeFiles) -> None:
    with path.open("rb") as file:
        text = file.read(_SCANNED_BYTES).decode(errors="replace")
        size = os.fstat(file.fileno()).st_size
    if has_private_key(text) and not name.endswith(".py"):
        found.refused[name] = "contains a private key"
        return
    found.kept.append(name)
    found.sizes[name] = size
    if redact(text) != text:
        found.suspicious.append(name)


def _is_in_repository(folder: Path) -> bool:
    """Check whether a git repository begins at or above a folder, so that its ignore file counts below."""
    return any((parent / ".git").exists() for parent in (folder, *folder.parents))


def _rules_of(folder: Path) -> Iterator[_Rule]:
    from pathspec import GitIgnoreSpec

    for name in IGNORE_FILES:
        path = folder / name
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            try:
                yield name, folder, GitIgnoreSpec.from_lines(lines)
            except ValueError as error:
                hint = "correct the line, or remove it"
                raise ConfigError(f"{path} is not valid: {first_line(error)}", hint=hint) from error


def _is_ignored(path: Path, rules: Sequence[_Rule], is_folder: bool) -> bool:
    """Return what the nearest file of ignore rules with a matching line decides."""
    for wanted in IGNORE_FILES:
        for name, base, spec in reversed(rules):
            if name == wanted and path.is_relative_to(base):
                relative = path.relative_to(base).as_posix() + ("/" if is_folder else "")
                if (decision := spec.check_file(relative).include) is not None:
                    return decision
    return False
