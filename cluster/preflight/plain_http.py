"""Check for credentials and data that would be sent unencrypted: plain http to a host that is not this machine."""

import os
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from outlast.checkpointing.storage.location import store_endpoints

#: For each variable that holds a server's address: the server, and the variables of its credentials.
_SERVERS = {
    "AWS_ENDPOINT_URL_S3": ("the S3 endpoint", ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_PROFILE")),
    "AWS_ENDPOINT_URL": ("the S3 endpoint", ("AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "AWS_PROFILE")),
    "MLFLOW_TRACKING_URI": ("the MLflow server", ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")),
    "WANDB_BASE_URL": ("the Weights & Biases server", ("WANDB_API_KEY",)),
    "HF_ENDPOINT": ("the Hugging Face endpoint", ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")),
}
_RAY_TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def plain_http_warnings(
    job_server: str | None = None, storages: tuple[str, ...] = (), environment: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """Yield a warning for each server that receives a credential over plain http.

    Args:
        job_server: Address of the job server; default: RAY_API_SERVER_ADDRESS.
        storages: URLs of storages and data, whose options may name an endpoint.
        environment: The variables of this process.
    """
    address = job_server or environment.get("RAY_API_SERVER_ADDRESS", "")
    has_token = environment.get("RAY_AUTH_MODE") == "token" or any(environment.get(name) for name in _RAY_TOKEN)
    if is_plain_http(address) and has_token:
        yield _warning("the job server", address, "a token")
    for variable, (server, credentials) in _SERVERS.items():
        address = environment.get(variable, "")
        if is_plain_http(address) and (urlsplit(address).password or any(map(environment.get, credentials))):
            yield _warning(f"{server} ({variable})", address, "credentials and data")
    for storage in storages:
        for endpoint in filter(is_plain_http, store_endpoints(storage)):
            yield _warning("the S3 endpoint", endpoint, "credentials and data")


def is_plain_http(address: str) -> bool:
    """Check whether an address is plain http to another machine; a name other than localhost is another machine."""
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
    except ValueError:
        return False
    if parts.scheme != "http" or not host or host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return not ip_address(host).is_loopback
    except ValueError:
        return True


def _warning(server: str, address: str, what: str) -> str:
    parts = urlsplit(address)
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    return f"{server} at {place} gets {what} unencrypted; use https, or a tunnel to this machine"
