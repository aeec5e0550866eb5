"""The client of a job server: Ray's own, with a time limit on each call and errors that name the cause and the remedy.

An address is taken as it was given: Ray's client would prefer RAY_ADDRESS to it. What may pass by itself (no answer, a
server that is restarted) raises JobServerUnavailable; all else is permanent.
"""

import io
import logging
import os
import re
import ssl
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from requests.utils import get_environ_proxies, select_proxy

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import ConfigError, PreflightError
from outlast.cluster.preflight.finding import TOKEN_HINT

CONNECT_TIMEOUT_S = 3.0
#: Of each read of an answer. The server itself waits some seconds for the agent of its node.
ANSWER_TIMEOUT_S = 30.0
#: Of each write of a package, and until it is stored.
UPLOAD_TIMEOUT_S = 120.0
DASHBOARD_PORT = 8265
#: Ray's defaults for other services of a head, which are given in place of the job server.
_OTHER_PORTS = {6379: "drivers", 10001: "Ray clients"}
_CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_TEMPORARY = (404, 408, 425, 429)
#: The head answers 500 whatever the agent of the node answered.
_REFUSED_BY_AGENT = re.compile(r"Request failed with status code (\d{3})\b")


class JobServerUnavailable(PreflightError):
    """No job server answers, or it has no answer now; a retry may succeed."""

    permanent = False


class JobExists(PreflightError):
    """A job has the id that was given for a new one."""


def is_job_server(address: str) -> bool:
    """Check whether an address is a job server's, and not one that a driver joins (`HOST:6379`, `auto`, `ray://…`)."""
    scheme, has_scheme, _ = address.partition("://")
    if has_scheme:
        return scheme.lower() in ("http", "https")
    if address in ("auto", "local"):
        return False
    port = address.rpartition(":")[2]
    return not port.isdecimal() or int(port) == DASHBOARD_PORT


def is_no_job_server(address: str) -> bool:
    """Check whether an address can only be that of a cluster that drivers join: `auto`, or a port of Ray's own."""
    return address in ("auto", "local") or address.endswith(tuple(f":{port}" for port in _OTHER_PORTS))


def server_url(address: str) -> str:
    """Return the URL of a job server that is given as a URL, HOST or HOST:PORT. Raises ConfigError if it is neither."""
    text = address.strip()
    try:
        ip_address(text)
    except ValueError:
        pass
    else:
        text = f"[{text}]" if ":" in text else text
    has_scheme = "://" in text
    try:
        parts = urlsplit(text if has_scheme else f"http://{text}")
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise _not_an_address(address, first_line(error)) from error
    if text in ("auto", "local"):
        raise _not_an_address(address, "it names a Ray of this machine", "127.0.0.1")
    if parts.scheme == "ray" or (not has_scheme and port in _OTHER_PORTS):
        users = _OTHER_PORTS.get(port or 0, "Ray clients")
        raise _not_an_address(address, f"{users} connect to it", host)
    if parts.scheme not in ("http", "https") or not host or any(map(str.isspace, text)):
        raise _not_an_address(address, "expected http://HOST:PORT, https://HOST or HOST:PORT")
    default = "" if has_scheme or port is not None else f":{DASHBOARD_PORT}"
    return f"{parts.scheme}://{parts.netloc.removesuffix(':')}{default}{parts.path}".rstrip("/")


def _not_an_address(address: str, reason: str, host: str = "HEAD") -> ConfigError:
    shown = f"[{host}]" if ":" in host else host
    hint = f"give the dashboard's: --address http://{shown}:{DASHBOARD_PORT}"
    return ConfigError(f"{address!r} is not the address of a job server: {reason}", hint=hint)


class JobServer(JobSubmissionClient):  # type: ignore[misc]
    """A connection to a job server, which has answered once.

    Raises:
        ConfigError: It is not the address of a job server, or what was sent is too large.
        JobServerUnavailable: It does not answer, or is no job server.
        PreflightError: It requires a token, or refuses what was sent.
    """

    def __init__(self, address: str) -> None:
        for name in _LOGGERS:  # which print what is uploaded, and how a log's stream ended
            logging.getLogger(name).setLevel(logging.WARNING)
        self._client_ray_version = ray.__version__
        verify = _trusted_certificates()
        super(JobSubmissionClient, self).__init__(server_url(address), verify=verify)  # Ray's own looks at RAY_ADDRESS
        answer = self._do_request("GET", "/api/version")
        if answer.status_code == 404:
            raise self._no_job_server("a web server answers, without Ray's API (HTTP 404)")
        if answer.status_code != 200:
            self._raise_error(answer)
        try:
            self._server_ray_version = str(answer.json()["ray_version"])
        except (ValueError, TypeError, KeyError) as error:
            raise self._no_job_server("a web server answers, without Ray's version") from error

    @property
    def has_proxy(self) -> bool:
        return self._proxy() is not None

    def _do_request(
        self,
        method: str,
        endpoint: str,
        *,
        data: bytes | None = None,
        json_data: dict[str, Any] | None = None,
        **options: Any,
    ) -> requests.Response:
        options["timeout"] = (CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S)
        if data is not None:  # as a file, of which each block has the limit; else all of it together
            data, options["timeout"] = io.BytesIO(data), (UPLOAD_TIMEOUT_S, UPLOAD_TIMEOUT_S)  # type: ignore[assignment]
        try:
            answer = super()._do_request(method, endpoint, data=data, json_data=json_data, **options)
        except AuthenticationError as error:
            through = f" (through the proxy {proxy})" if (proxy := self._proxy()) else ""
            problem = f"the job server at {self._address} requires a token{through}: {error.message.splitlines()[0]}"
            raise PreflightError(problem, hint=TOKEN_HINT) from error
        except (OSError, ValueError) as error:
            raise self._unreachable(error) from error
        is_package = endpoint.startswith("/api/packages/")
        if answer.status_code == 413 or (answer.status_code == 500 and "Maximum request body size" in answer.text):
            raise ConfigError(
                f"the job server at {self._address} refuses a package of this size: {_message(answer)}",
                hint="see `outlast submit RUN.yaml --code … --dry-run` for what is sent and how large it is, and leave "
                "files out by .outlastignore",
            )
        if answer.status_code >= 500:
            inner = _REFUSED_BY_AGENT.search(answer.text)
            if inner is None or int(inner[1]) >= 500:
                raise self._no_job_server(_message(answer))
            answer.status_code = int(inner[1])
            self._raise_error(answer)
        if answer.status_code == 200 and not is_package and "json" not in answer.headers.get("content-type", ""):
            page = " after a redirection" if answer.history else ""
            raise self._no_job_server(f"a web server answers with a page{page}, perhaps one to log in")
        return answer

    def _raise_error(self, r: requests.Response) -> None:
        text = f"the job server at {self._address} answers: {_message(r)}"
        if r.status_code == 400 and "already exists" in r.text:
            raise JobExists(text, hint="give the run another name")
        if r.status_code in _TEMPORARY:
            raise JobServerUnavailable(text, hint="`outlast list --address …` shows the jobs that it knows")
        raise PreflightError(text, hint="correct what it names, and submit again")

    def _proxy(self) -> str | None:
        proxy: str | None = select_proxy(self._address, get_environ_proxies(self._address))
        return proxy

    def _no_job_server(self, reason: str, hint: str = "") -> JobServerUnavailable:
        hint = hint or f"check the address (the dashboard's, usually port {DASHBOARD_PORT})"
        if (proxy := self._proxy()) is not None:
            host, scheme = urlsplit(self._address).hostname, urlsplit(self._address).scheme
            reason += f" (through the proxy {proxy})"
            hint = f"to connect without the proxy: export NO_PROXY={host}; else correct {scheme.upper()}_PROXY"
        return JobServerUnavailable(f"no job server answers at {self._address}: {reason}", hint=hint)

    def _unreachable(self, error: Exception) -> JobServerUnavailable:
        """Return the error for a request that got no answer."""
        text = " ".join(map(str, _causes(error)))
        place = self._address.partition("://")[2]
        if isinstance(error, requests.ConnectTimeout):
            hint = f"check the host, the VPN and the firewall; or use a tunnel: ssh -L {DASHBOARD_PORT}:localhost:"
            hint += f"{DASHBOARD_PORT} HEAD, then --address http://localhost:{DASHBOARD_PORT}"
            return self._no_job_server(f"no connection within {CONNECT_TIMEOUT_S:g} s", hint)
        if isinstance(error, requests.Timeout):
            hint = "see whether the head is overloaded, and restart its dashboard if not; it is usually port "
            return self._no_job_server(
                f"it accepts connections, and does not answer within {ANSWER_TIMEOUT_S:g} s", f"{hint}{DASHBOARD_PORT}"
            )
        if "CERTIFICATE_VERIFY_FAILED" in text:
            reason = next((item.verify_message for item in _causes(error) if hasattr(item, "verify_message")), "")
            hint = f"trust the authority that signed it: export {_CA_VARIABLES[0]}=/path/of/ca.pem"
            return self._no_job_server(f"its TLS certificate is not trusted: {reason}", hint)
        if isinstance(error, requests.exceptions.SSLError):
            return self._no_job_server("it has no TLS at this port", f"give --address http://{place}")
        if "Name or service not known" in text or "NameResolutionError" in text or "getaddrinfo" in text:
            return self._no_job_server(f"the host {urlsplit(self._address).hostname} is unknown")
        if isinstance(error, requests.TooManyRedirects):
            return self._no_job_server("a web server answers with endless redirections")
        reasons = [item.strerror for item in _causes(error) if isinstance(item, OSError) and item.strerror]
        return self._no_job_server(str(reasons[-1]) if reasons else "what answers is not a web server")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _message(answer: requests.Response) -> str:
    """Return the last line of an answer that has words, which is the message of a traceback; of a page its status."""
    lines = [line.strip() for line in answer.text.splitlines() if any(map(str.isalnum, line))]
    is_page = "html" in answer.headers.get("content-type", "")
    return lines[-1][:300] if lines and not is_page else f"HTTP {answer.status_code} {answer.reason}"


def _trusted_certificates() -> str | bool:
    """Return the certificates that `requests` would trust, for the connections that Ray opens without it."""
    for variable in _CA_VARIABLES:
        if path := os.environ.get(variable):
            try:
                is_folder = os.path.isdir(path)
                ssl.create_default_context(capath=path if is_folder else None, cafile=None if is_folder else path)
            except OSError as error:
                problem = f"{variable} is {path}, which holds no certificates: {error.strerror or error.args[-1]}"
                raise ConfigError(problem, hint=f"set {variable} to a file of certificates (PEM)") from error
            return path
    return True
