"""Where the client finds its cluster and credentials: the kubeconfig, or a pod's service account."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import PreflightError
from outlast.cluster.kubernetes.accessors import mapping

#: A pod's own credentials.
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def configure(settings: Any, context: str | None) -> str:
    """Fill in the client's settings, from the kubeconfig or a pod's service account. Return the namespace.

    Raises PreflightError if nothing is configured, or if a credential plugin fails.
    """
    from kubernetes import config

    file = os.environ.get("KUBECONFIG") or "~/.kube/config"  # the client reads the variable once, at import
    found = any(Path(part).expanduser().is_file() for part in file.split(os.pathsep))
    try:
        if not found:
            config.load_incluster_config(client_configuration=settings)
            return (SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
        with _logged_errors() as errors:
            config.load_kube_config(config_file=file, context=context, client_configuration=settings)
        contexts, current = config.list_kube_config_contexts(file)
    except (TypeError, AttributeError, KeyError, UnicodeDecodeError) as error:  # the client trusts the file's types
        hint = "`kubectl config view` reads the same file"
        raise PreflightError(f"the kubeconfig {file} is malformed: {first_line(error)}", hint=hint) from error
    except (config.ConfigException, OSError) as error:
        if found or "KUBERNETES_SERVICE_HOST" in os.environ:  # the latter in a pod
            reason, hint = first_line(error), "set KUBECONFIG, or give --context"
        else:
            reason, hint = (
                f"there is no file {file}",
                "set KUBECONFIG to the file that your cluster's provider gave you",
            )
        raise PreflightError(f"no cluster is configured: {reason}", hint=hint) from error
    if errors and not (settings.api_key or settings.cert_file):
        raise PreflightError(
            f"the kubeconfig's credential plugin failed: {'; '.join(errors)}",
            hint="install it or log in, as your cluster's provider says; `kubectl get namespaces` meets the same error",
        )
    chosen = next((item for item in contexts if item["name"] == context), current)
    return str(mapping(chosen, "context").get("namespace") or "default")


@contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """Collect what the client logs as errors: it goes on without credentials if a plugin fails."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage().strip())

    handler = Collector(logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger().removeHandler(handler)
