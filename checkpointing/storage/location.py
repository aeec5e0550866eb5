"""The one parser of storage and data locations: a path, or the URL of an object store.

A path is taken as it is. A URL is a scheme and `://`; whatever would have to be guessed is refused, and so is a URL
with a credential in it. Everything that reads a location asks here, so all commands agree on what it means.
"""

import os
import re
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from outlast.checkpointing.errors import ConfigError

#: A path or a URL, as a user gives it.
Location = str | os.PathLike[str]

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
#: Schemes without both slashes, which no directory is called by intention; a path after `:/` is a typing error too.
_HALF_A_URL = re.compile(
    r"(file|s3|gs|gcs|hdfs|abfss?|https?):(/?)(.*)|(\w{2,}):(/)(?!/)(.*)", re.IGNORECASE | re.DOTALL
)
#: A variable in a run file, unexpanded where only another machine has it.
ENV_VARIABLE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_BUCKET_SCHEMES = ("s3", "gs", "gcs")
_AZURE_SCHEMES = ("abfs", "abfss")
#: Schemes of pyarrow.fs; `mock` is its file system in memory.
_SCHEMES = (*_BUCKET_SCHEMES, *_AZURE_SCHEMES, "hdfs", "viewfs", "mock")
#: Names that other programs have for these stores.
_SYNONYMS = {"s3a": "s3", "s3n": "s3", "azure": "abfs", "az": "abfs", "adl": "abfs", "wasb": "abfs", "wasbs": "abfss"}
#: Options of a URL that name a server (of Azure the end of its name, such as `.host:1`), each with that of its scheme.
_ENDPOINTS = {
    "endpoint_override": "scheme",
    "blob_storage_authority": "blob_storage_scheme",
    "dfs_storage_authority": "dfs_storage_scheme",
}
#: Ports of HDFS: its name node, unless the URL has another, and its data nodes.
_NAME_NODE, _DATA_NODE = 8020, 9866


def is_url(text: str) -> bool:
    """Return whether a text is a URL of any scheme, `file://` too, and not a path."""
    return _URL.fullmatch(text) is not None


def parse_location(location: Location) -> Path | str:
    """Return the path of a local location, with `~` expanded, or the URL of another one, its scheme in lower case.

    Raises:
        ConfigError: It is neither, such as `file://./runs`, whose `.` would be a host; or a URL of a scheme without
            storage, without a bucket, or with a credential.
    """
    if not isinstance(location, str | os.PathLike):
        raise ConfigError(f"{location!r} is neither a path nor a URL", hint="name a directory, or s3://bucket/prefix")
    if not isinstance(location, str):
        return _path(os.fsdecode(os.fspath(location)))
    text = location
    if not (match := _URL.fullmatch(text)):
        if _URL.fullmatch(text.lstrip()):
            raise ConfigError(f"{text!r} is a URL after a blank", hint=f"write {text.lstrip()}")
        if half := _HALF_A_URL.fullmatch(text):
            scheme, slash, rest = half.groups()[:3] if half[1] else half.groups()[3:]
            meant = slash + rest if scheme.lower() == "file" else f"{scheme.lower()}://{rest}"
            hint = f"write {meant}, or ./{text} for a directory of that name"
            raise ConfigError(f"{text} is neither a path nor a URL; did you mean {meant}?", hint=hint)
        return _path(text)
    scheme, rest = match[1].lower(), match[2]
    if scheme != "file":
        return _store_url(scheme, rest)
    host, slash, path = rest.partition("/")
    if host.lower() not in ("", "localhost") or not slash:
        written = host.rpartition("@")[2]
        raise ConfigError(
            f"file://{written}{slash}{path} names a file on the host {written!r}, not a path",
            hint=f"write the path alone, such as {written}{slash}{path}, or file:/// and an absolute path",
        )
    return _path(unquote(slash + path))


def store_endpoints(url: str) -> list[str]:
    """Return the servers that a store's URL names in its options, as `https://host:port`; none if it is the cloud's."""
    options = {key: values[0] for key, values in parse_qs(urlsplit(url).query).items()}
    endpoints = []
    for key, scheme in _ENDPOINTS.items():
        if key in options:
            server = _server(options[key])
            endpoints.append(f"{server.scheme or options.get(scheme, 'https')}://{server.netloc}")
    return endpoints


def store_ports(url: str) -> set[int]:
    """Return the TCP ports on which a store is reached, given a URL that `parse_location` returned."""
    parts = urlsplit(url)
    if parts.scheme in ("hdfs", "viewfs"):
        return {parts.port or _NAME_NODE, _DATA_NODE}
    servers = map(urlsplit, store_endpoints(url))
    return {server.port or (80 if server.scheme == "http" else 443) for server in servers} or {443}


def _path(text: str) -> Path:
    try:
        is_path = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a character, as YAML and JSON can escape it
        is_path = False
    if not is_path:
        raise ConfigError(f"{text!r} is not a path", hint="name a directory, or s3://bucket/prefix")
    if text.startswith("//"):  # which pathlib keeps, although Linux takes it for one slash
        text = f"/{text.lstrip('/')}"
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{text}: {error}", hint="write the absolute path") from error


def _store_url(scheme: str, rest: str) -> str:
    """Return the URL of a store. No message repeats `rest`, which may hold a credential."""
    if scheme not in _SCHEMES:
        hint = "use a directory or s3://bucket/prefix; other stores of pyarrow.fs are gs, abfs and hdfs"
        if scheme in ("http", "https"):
            hint = "download it, and name the path; or copy it to a bucket: s3://bucket/prefix"
        elif scheme in _SYNONYMS:
            hint = f"write {_SYNONYMS[scheme]}://…"
        raise ConfigError(f"{scheme}:// is not a kind of storage that outlast reads", hint=hint)
    example = "s3://bucket/prefix" if scheme not in _AZURE_SCHEMES else "abfs://container@account.dfs.core.windows.net/"
    try:
        parts = urlsplit(f"{scheme}://{ENV_VARIABLE.sub('1', rest)}")  # which may be a host, a bucket or a port
        options = parse_qs(parts.query)
        if not rest.isprintable():  # urlsplit drops line breaks
            raise ValueError("a character of it cannot be printed")
        servers = [_server(item) for key in _ENDPOINTS for item in options.get(key, [])]
        if any(server.port == 0 for server in servers):  # reading an invalid port raises too
            raise ValueError("port 0 is not a server's")
    except ValueError as error:
        raise ConfigError(f"{scheme}://…: {error}", hint=f"write it as {example}") from error
    has_user = "@" in parts.netloc and scheme not in (*_AZURE_SCHEMES, "hdfs")
    if has_user or parts.password or any("@" in server.netloc for server in servers):
        hint = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        raise ConfigError(f"storage {scheme}://…: a URL must not carry credentials", hint=hint)
    if scheme in (*_BUCKET_SCHEMES, *_AZURE_SCHEMES) and not parts.netloc.strip():
        raise ConfigError(f"{scheme}://{parts.path} names no bucket", hint=f"write it as {example}")
    if scheme in _BUCKET_SCHEMES and ":" in parts.netloc:
        hint = f"write {scheme}://bucket/prefix?endpoint_override=HOST:PORT"
        raise ConfigError(f"{scheme}://…: its bucket has a port or a password, which no bucket has", hint=hint)
    return f"{scheme}://{rest}"


def _server(endpoint: str) -> SplitResult:
    """Split `host:port`, with or without a scheme. Raises ValueError if it is malformed; `port` may raise it too."""
    return urlsplit(endpoint if "://" in endpoint else f"//{endpoint}")
