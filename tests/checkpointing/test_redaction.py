"""Credentials never stand in text that is written or printed, and other text is left as it is."""

from __future__ import annotations

import json
import pickle

import pytest

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import ConfigError, StorageError
from outlast.checkpointing.redaction import REDACTED, redact, redact_json
from outlast.checkpointing.run_store.events import AttemptErrorEvent, TrackerEvent
from outlast.checkpointing.run_store.journal import Journal, read_events
from outlast.checkpointing.storage.local import LocalStorage

PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEcanary\nabc\n-----END RSA PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("at postgres://me:canary@host/db now", f"at postgres://{REDACTED}@host/db now"),
        ("https://me:c@nary@host:8080/a", f"https://{REDACTED}@host:8080/a"),
        ("redis://:canary@host", f"redis://{REDACTED}@host"),
        ("https://h/a?X-Amz-Signature=canary&b=1", f"https://h/a?X-Amz-Signature={REDACTED}&b=1"),
        ("s3://b/a?secret_key=canary&region=x", f"s3://b/a?secret_key={REDACTED}&region=x"),
        ("abfs://a@b?sig=can%2Bary", f"abfs://a@b?sig={REDACTED}"),
        ("GET /?token=canary HTTP/1.1", f"GET /?token={REDACTED} HTTP/1.1"),
        ("Authorization: Bearer canary.canary", f"Authorization: Bearer {REDACTED}"),
        ("'authorization': 'Basic Y2FuYXJ5OnB3'", f"'authorization': 'Basic {REDACTED}'"),
        (f"key {PEM} end", f"key {REDACTED} end"),
        (PEM[:50], REDACTED),
        *(
            (f"a {token}.", f"a {REDACTED}.")
            for token in (
                "hf_" + "aB3" * 10,
                "ghp_" + "aB3" * 12,
                "github_pat_" + "a1_" * 12,
                "AKIAIOSFODNN7EXAMPLE",
                "sk-proj-" + "aB3_" * 8,
                "xoxb-1234567890-abc",
                "AIza" + "a1_B-" * 7,
                JWT,
            )
        ),
    ],
)
def test_shapes_of_credentials(text: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # it holds the parameters
    assert redact(text) == expected
    assert redact(expected) == expected, "once is enough"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/runs?region=eu-west-1&scheme=http&endpoint_override=127.0.0.1:9000",
        "http://127.0.0.1:8265/api/version asked by me@host",
        "abfs://container@account.dfs.core.windows.net/runs",
        "https://h/a?author=me&tokenizer=bpe",
        "git@github.com:me/mine.git and ssh://git@github.com/me/mine",
        "/home/me/runs/run/attempts/0001-0a1b2c3d/checkpoint-100",
        "tokenizer.json has 1,000,000 tokens; the key 'text' is missing; sk-learn; desk-lamp-that-is-quite-long-indeed",
        "step 12: loss 0.5 (lr 1e-4) → Überraschung 学习 نمونه",
    ],
)
def test_other_text_is_left_as_it_is(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    ("name", "value", "text", "expected"),
    [
        ("MY_API_KEY", "can/ary+1", "it is can/ary+1!", "it is <MY_API_KEY>!"),
        ("MY_API_KEY", "can/ary+1", "?x=can%2Fary%2B1", "?x=<MY_API_KEY>"),
        ("DB_PASS", "hunter2", "for hunter2, or hunter22", "for <DB_PASS>, or hunter22"),
        ("DATABASE_URL", "postgres://me:can%2Fary1@h/db", "wrong password can/ary1", "wrong password <DATABASE_URL>"),
        ("DSN", "host=h user=me password=canary1 port=1", "canary1 is wrong", "<DSN> is wrong"),
        ("AZURE", "AccountName=a;AccountKey=canary1==;B=c", "key canary1==", "key <AZURE>"),
        ("DATABASE_URL", "postgres://me:it's<canary1@h/db", "password it's<canary1", "password <DATABASE_URL>"),
        ("PIP_INDEX_URL", f"https://aws:{'canary1' * 200}@h/simple", "canary1" * 200, "<PIP_INDEX_URL>"),
        ("SIGNED", "https://h/?x=1&token=canary1", "canary1 is wrong", "<SIGNED> is wrong"),
        ("KAFKA", 'login username="me" password="canary1";', "canary1 is wrong", "<KAFKA> is wrong"),
        ("MY_TOKEN", "canary1\n", "'canary1' is wrong", "'<MY_TOKEN>' is wrong"),
        ("MY_TOKEN", 'can\\ary"1', json.dumps({"a": 'can\\ary"1'}), '{"a": "<MY_TOKEN>"}'),
        ("MY_TOKEN", "can\\ary'1\"", repr("can\\ary'1\""), "'<MY_TOKEN>'"),
        ("MY_SECRET", "canary-of-line-1\ncanary-of-line-2", "  canary-of-line-2", "  <MY_SECRET>"),
        ("AWS_CREDS", "canary1", "canary1 is wrong", "<AWS_CREDS> is wrong"),
        ("SSHPASS", "canary1", "canary1 is wrong", "<SSHPASS> is wrong"),
        ("A_SECRET", "a long secret of 23 signs", "xa long secret of 23 signsx", "x<A_SECRET>x"),
        ("POSTGRES_PASSWORD", "postgres", "no postgres here", "no postgres here"),
        ("MAX_TOKENS", "1000000", "1000000 tokens", "1000000 tokens"),
        ("TOKENIZERS_PARALLELISM", "false-ish", "false-ish", "false-ish"),
        ("SSH_KEY_FILE", "/etc/passwd", "/etc/passwd", "/etc/passwd"),
        ("PLAIN", "canary-value-of-no-secret", "canary-value-of-no-secret", "canary-value-of-no-secret"),
    ],
)
def test_values_of_the_environment(
    name: str, value: str, text: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert redact(text) == expected


@pytest.mark.parametrize(
    "piece",
    ["://a:", "eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "?token=", "authorization:", "?secret", "sk-", "?a-", "a"],
)
def test_the_time_is_linear_in_the_length(piece: str) -> None:
    """A journal or a log may hold a line of any form; a pattern that backtracks would take hours."""
    assert redact(piece * (300_000 // len(piece)))


def test_json_keeps_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", 'can"ary\n1')
    body = {"a": ['can"ary\n1', 1, None, 0.5, True], "b": {'can"ary\n1': ("x",)}}
    assert redact_json(body) == {"a": ["<MY_TOKEN>", 1, None, 0.5, True], "b": {"<MY_TOKEN>": ["x"]}}


def test_an_error_holds_no_credential() -> None:
    error = StorageError("cannot list s3://me:canary@b", hint="open https://h?token=canary")
    assert "canary" not in f"{error} {error!r} {error.message} {error.hint}"
    again = pickle.loads(pickle.dumps(error))
    assert (again.message, again.hint) == (error.message, error.hint)
    assert "canary" not in str(ConfigError("Bearer canary-canary-canary"))


def test_an_error_acts_on_no_terminal() -> None:
    """A loop of the user may let Python print it."""
    error = StorageError("a\x1b[2J\n  b\u202e", hint="c\r\x9b")
    assert (str(error), error.hint) == ("a\\x1b[2J\n  b\\u202e", "c\\r\\x9b")


def test_a_credential_is_redacted_before_the_rest_is_cut_off() -> None:
    text = "x" * 280 + " https://me:" + "canary" * 10 + "@host"
    assert "canary" not in first_line(OSError(text))


def test_a_journal_holds_no_credential(storage: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-1")
    journal = Journal(storage, "redacted/attempts/a", 0, flush_s=0)
    journal.write(AttemptErrorEvent(step=3, error="ValueError: canary-1", final=False))
    journal.write(TrackerEvent(name="wandb", message="401 for https://h?api_key=canary-2"))
    found = list(read_events(storage, "redacted/attempts/a"))
    assert [event.get("error") or event.get("message") for event in found] == [
        "ValueError: <MY_TOKEN>",
        f"401 for https://h?api_key={REDACTED}",
    ]
    assert "canary" not in json.dumps(found)
