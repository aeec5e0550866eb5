"""Provenance record of a launch, for reproducing it: code, libraries, machine, data, settings.

The driver writes it once per launch, in a thread: no worker waits for it. It must never hold the value of an
environment variable or the content of a file that the user's repository does not track; credentials in the rest are
redacted.
"""

import json
import os
import platform
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import RECORD
from outlast.checkpointing.redaction import redact, redact_json
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.location import ENV_VARIABLE
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver.code_files import CREDENTIAL_FILES
from outlast.cluster.preflight.doctor_probe import cpu_capability, find_gpus
from outlast.trainers.host_info import host_facts
from outlast.trainers.preparation.prepare import Prepared

#: State of the code at submission; the code itself is sent without its repository.
CODE_FILE = "outlast-code.json"
DIFF = "code.diff"
DIFF_BYTES = 256 * 1024
_READ_BYTES = 4 * DIFF_BYTES
_CODE = (".py", ".yaml", ".yml", ".toml")
_GIT_S = 20
_GIT = ("git", "--no-optional-locks", "-c", "core.fsmonitor=false")
_MOST_NAMES = 200


def record_provenance(
    store: RunStore, config: RunConfig, declared: Mapping[str, Any], launch: str, prepared: Prepared, code: str
) -> threading.Thread:
    """Start writing the record of a launch. Returns the thread, which ends once it is written or writing failed."""

    def write() -> None:
        with suppress(StorageError, OSError):  # a missing record must not end a run
            code_info = code_state(Path(code)) if code else {}
            diff = code_info.pop(DIFF, "")
            body = {
                "launch": launch,
                "made_at": time.time(),
                "code": code_info,
                "packages": packages(),
                "machine": {"host": socket.gethostname(), "platform": platform.platform(), **host_facts(None)}
                | {"cpu_capability": cpu_capability(), "gpus": find_gpus()},
                "data": {
                    "fingerprint": prepared.fingerprint,
                    "rows": prepared.num_rows,
                    "samples": prepared.num_samples,
                },
                "settings": resolved(config, declared),
            }
            if diff:
                store.storage.put(f"{store.launch_dir(launch)}/{DIFF}", [redact(str(diff)).encode()])
            text = json.dumps(redact_json(body), indent=1, sort_keys=True).encode()
            store.storage.put(f"{store.launch_dir(launch)}/{RECORD}", [text + b"\n"])

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def packages() -> dict[str, str]:
    """Return every installed distribution and its version, like `pip freeze`."""
    versions = {item.metadata["Name"]: item.version for item in distributions()}
    return dict(sorted((name, version) for name, version in versions.items() if name))


def resolved(config: RunConfig, declared: Mapping[str, Any]) -> Any:
    """Return the settings with all defaults, and `${env:…}` unexpanded."""
    return _unexpanded(config.model_dump(mode="json", by_alias=True), declared)


def _unexpanded(value: Any, declared: Any) -> Any:
    if isinstance(declared, str) and ENV_VARIABLE.search(declared):
        return declared
    if isinstance(value, dict) and isinstance(declared, Mapping):
        return {key: _unexpanded(item, declared.get(key)) for key, item in value.items()}
    if isinstance(value, list) and isinstance(declared, list) and len(value) == len(declared):
        return [_unexpanded(item, other) for item, other in zip(value, declared, strict=True)]
    return value


def code_state(folder: Path) -> dict[str, Any]:
    """Return the commit of a directory's code and, under `code.diff`, the difference from it as text.

    For a submitted directory it is the state recorded at submission.
    """
    with suppress(OSError, ValueError):
        recorded: dict[str, Any] = json.loads((folder / CODE_FILE).read_text())
        return recorded
    state: dict[str, Any] = {"folder": str(folder.absolute())}
    try:
        root = Path(_git(folder, "rev-parse", "--show-toplevel").strip())
        commit = _git(root, "rev-parse", "HEAD").strip()
        status = [line for line in _git(root, "status", "--porcelain", "-z").split("\0") if line]
        text, is_whole = _changes(root)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        return {**state, "git": None, "why": (reason.splitlines() or ["?"])[0]}
    diff = redact(text)
    cut = not is_whole or len(diff.encode()) > DIFF_BYTES
    if cut:
        diff = diff.encode()[:DIFF_BYTES].decode(errors="ignore")
    changed = [line[3:] for line in status]
    untracked = [line[3:] for line in status if line.startswith("??")]
    state |= {"git": commit, "remote": _remote(root), "changed": changed[:_MOST_NAMES], "num_changed": len(changed)}
    state["untracked"] = untracked[:_MOST_NAMES]
    return {**redact_json(state), "diff_cut": cut, DIFF: diff}


def _git(folder: Path, *arguments: str) -> str:
    """Return the output of a git command that takes no lock and never prompts."""
    command = [*_GIT, "-C", str(folder), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=_GIT_S, check=True, env=_git_environment()
    )
    return done.stdout


def _git_environment() -> dict[str, str]:
    return {**os.environ, "GIT_TERMINAL_PROMPT": "0"}


def _changes(root: Path) -> tuple[str, bool]:
    """Return the differences from the commit in tracked code files, and whether that is all of them."""
    patterns = [f"*{suffix}" for suffix in _CODE] + [f":(exclude,icase,glob)**/{name}" for name in CREDENTIAL_FILES]
    options = ("--no-ext-diff", "--no-textconv", "--no-color")
    command = [*_GIT, "-C", str(root), "diff", "HEAD", *options, "--", *patterns]
    with tempfile.TemporaryFile() as output:
        subprocess.run(
            command, stdout=output, stderr=subprocess.DEVNULL, timeout=_GIT_S, check=True, env=_git_environment()
        )
        output.seek(0)
        data = output.read(_READ_BYTES)
        is_whole = not output.read(1)
    if not is_whole:  # a credential that is cut would not be recognised
        data = data[: data.rfind(b"\n") + 1]
    return data.decode(errors="replace"), is_whole


def _remote(root: Path) -> str:
    """Return the origin's URL without user name and password."""
    with suppress(subprocess.SubprocessError):
        url = _git(root, "remote", "get-url", "origin").strip()
        parts = urlsplit(url)
        if parts.scheme and parts.hostname:
            return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        return url
    return ""
