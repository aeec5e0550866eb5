"""Warnings of credentials over plain http."""

from __future__ import annotations

import pytest

from outlast.cluster.preflight.plain_http import is_plain_http, plain_http_warnings


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://head:8265", True),
        ("http://10.0.0.7:8265", True),
        ("http://[fd00::1]:8265", True),
        ("http://me:canary@head", True),
        ("https://head:8265", False),
        ("http://127.0.0.1:8265", False),
        ("http://127.8.8.8", False),
        ("http://[::1]:8265", False),
        ("http://localhost:8265", False),
        ("http://[oops", False),
        ("", False),
    ],
)
def test_addresses(address: str, expected: bool) -> None:
    assert is_plain_http(address) is expected


@pytest.mark.parametrize(
    ("job_server", "storages", "environment", "expected"),
    [
        ("http://head:8265", (), {"RAY_AUTH_TOKEN": "x"}, ["the job server at http://head:8265 gets a token"]),
        ("http://head:8265", (), {}, []),
        (
            None,
            (),
            {"RAY_API_SERVER_ADDRESS": "http://h:1", "RAY_AUTH_MODE": "token"},
            ["the job server at http://h:1"],
        ),
        (None, (), {"AWS_ENDPOINT_URL": "http://minio:9000", "AWS_ACCESS_KEY_ID": "x"}, ["(AWS_ENDPOINT_URL) at http"]),
        (None, (), {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000", "AWS_ACCESS_KEY_ID": "x"}, []),
        (None, (), {"MLFLOW_TRACKING_URI": "http://me:canary@m"}, ["(MLFLOW_TRACKING_URI) at http://m gets"]),
        (None, (), {"WANDB_BASE_URL": "http://w", "WANDB_API_KEY": "x"}, ["(WANDB_BASE_URL)"]),
        (None, ("s3://b/a?scheme=http&endpoint_override=minio:9000",), {}, ["the S3 endpoint at http://minio:9000"]),
        (None, ("s3://b/a?endpoint_override=minio:9000", "./runs"), {}, []),
    ],
)
def test_warnings(
    job_server: str | None, storages: tuple[str, ...], environment: dict[str, str], expected: list[str]
) -> None:
    found = list(plain_http_warnings(job_server, storages, environment))
    assert len(found) == len(expected)
    assert all(part in text for part, text in zip(expected, found, strict=True))
    assert "canary" not in str(found)
