"""Ports that a run's pods reach outside: the settings name those to open; others cause a warning. Pure."""

from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from outlast.checkpointing.storage.location import store_endpoints, store_ports
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.kubernetes.pod_paths import store_urls
from outlast.cluster.kubernetes.settings import K8sSettings
from outlast.trainers.config.model import is_model_path

_HTTPS = 443
#: The API server, by its service and by its own port.
_API_SERVER = {443, 6443}


def egress_ports(config: RunConfig, settings: K8sSettings, *, autoscales: bool) -> set[int]:
    """Return the ports that the settings need, to any address: an object store has no fixed one."""
    ports = set(settings.egress_ports).union(*map(store_ports, store_urls(config)))
    if _uses_hub(config) or "wandb" in (config.track.to or ()):
        ports.add(_HTTPS)
    return ports | _API_SERVER if autoscales else ports


def egress_warnings(
    config: RunConfig, settings: K8sSettings, environment: Mapping[str, str], *, autoscales: bool
) -> Iterator[str]:
    """Yield servers that the NetworkPolicy blocks: pods learn their addresses from a secret, which is not read.

    Args:
        config: The run.
        settings: The cluster.
        environment: Variables of this process, whose addresses the secret probably has too.
        autoscales: Whether the autoscaler reaches the API server.
    """
    if not settings.network_policy:
        return
    ports = egress_ports(config, settings, autoscales=autoscales)
    for variable in _address_variables(config):
        try:
            server = urlsplit(environment.get(variable, ""))
            port = server.port or (80 if server.scheme == "http" else _HTTPS)
        except ValueError:
            continue
        if server.hostname and port not in ports:
            text = f"{variable} is set here to a server on port {port}, which the NetworkPolicy blocks"
            yield f"{text}; if the pods' secret has it too: --egress-port {port}"
    if "mlflow" in (config.track.to or ()) and not settings.egress_ports and "MLFLOW_TRACKING_URI" not in environment:
        yield "the NetworkPolicy blocks the MLflow server: --egress-port PORT opens its port"


def _address_variables(config: RunConfig) -> Iterator[str]:
    """Yield the variables from which the run's pods would take a server's address."""
    if any(url.startswith("s3://") and not store_endpoints(url) for url in store_urls(config)):
        yield from ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    if _uses_hub(config):
        yield "HF_ENDPOINT"
    trackers = {"mlflow": "MLFLOW_TRACKING_URI", "wandb": "WANDB_BASE_URL"}
    yield from (variable for name, variable in trackers.items() if name in (config.track.to or ()))


def _uses_hub(config: RunConfig) -> bool:
    return not all(map(is_model_path, config.model_names.values()))
