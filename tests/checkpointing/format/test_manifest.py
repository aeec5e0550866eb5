"""The manifest comes back as it was written, or is told to be damaged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128

from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.format.manifest import BLOCK_BYTES, Digester, FileEntry, Manifest, ManifestError


def sample_manifest() -> Manifest:
    lower, upper = AttemptId(1, "aaaa"), AttemptId(2, "bbbb")
    return Manifest(
        ref=CheckpointRef(20, upper),
        lineage=(CheckpointRef(10, lower), CheckpointRef(5, lower)),
        files=(FileEntry("a.json", 3, "0" * 32, ("1" * 16,)), FileEntry("é/empty", 0, "2" * 32, ())),
        world_size=4,
        metrics={"loss": 1.25, "eval_loss": 0.1 + 0.2},
        committed_at=1_700_000_000.123,
        launch="launch-é",
        extra={"final_step": 20},
    )


def test_a_manifest_comes_back_as_it_was() -> None:
    manifest = sample_manifest()
    assert Manifest.parse(manifest.to_json()) == manifest
    assert manifest.num_bytes == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.0, 5e-324])
def test_a_manifest_carries_any_metric(value: float) -> None:
    manifest = replace(sample_manifest(), metrics={"loss": value})
    back = Manifest.parse(manifest.to_json())
    assert back.to_json() == manifest.to_json()
    assert repr(back.metrics["loss"]) == repr(value)


def test_a_manifest_tells_every_flipped_bit() -> None:
    """Or else it still says the same: `\\u00e9` and `\\u00E9` are one letter."""
    manifest = sample_manifest()
    data = manifest.to_json()
    num_told = 0
    for position in range(len(data)):
        for bit in range(8):
            tampered = bytearray(data)
            tampered[position] ^= 1 << bit
            try:
                assert Manifest.parse(bytes(tampered)) == manifest
            except ManifestError:
                num_told += 1
    assert num_told > 0.99 * 8 * len(data)


def test_a_manifest_tells_every_truncation() -> None:
    data = sample_manifest().to_json()
    for length in range(len(data) - 1):
        with pytest.raises(ManifestError):
            Manifest.parse(data[:length])


@pytest.mark.parametrize(
    "change",
    [
        {"step": 21},
        {"attempt": "0003-cccc"},
        {"lineage": []},
        {"files": []},
        {"world_size": 5},
        {"metrics": {"loss": 1.0}},
        {"more": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_tells_a_changed_field(change: dict[str, object]) -> None:
    body = json.loads(sample_manifest().to_json())
    with pytest.raises(ManifestError, match="digest"):
        Manifest.parse(json.dumps({**body, **change}).encode())


@given(st.binary(max_size=200))
def test_anything_else_is_not_a_manifest(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.parse(data)


@pytest.mark.parametrize("data", [b"null", b"[]", b"{}", b'"text"', b'{"digest": 1}', b'{"digest": 1, "format": 2}'])
def test_other_json_is_not_a_manifest(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.parse(data)


@given(sizes=st.lists(st.integers(0, 3000), max_size=6))
def test_digests_do_not_depend_on_how_the_bytes_come(sizes: list[int]) -> None:
    data = bytes(index % 251 for index in range(sum(sizes)))
    whole, parts = Digester(), Digester()
    whole.update(data)
    begin = 0
    for size in sizes:
        parts.update(data[begin : begin + size])
        begin += size
    assert parts.entry("a") == whole.entry("a")


def test_blocks_end_where_they_should() -> None:
    """A file of one block and a byte has two block digests, the second of that byte alone."""
    data = bytes(BLOCK_BYTES) + b"x"
    across, single, tail = Digester(), Digester(), Digester()
    across.update(memoryview(data)[: BLOCK_BYTES - 5])
    across.update(memoryview(data)[BLOCK_BYTES - 5 :])
    single.update(data[:-1])
    tail.update(b"x")
    assert across.entry("a").blocks == single.entry("a").blocks + tail.entry("a").blocks


# -- manifests from anywhere -------------------------------------------------------------------------------------------


def forged(**changes: object) -> bytes:
    """A manifest with other values and the digest that they have."""
    body = {**json.loads(sample_manifest().to_json()), **changes}
    del body["digest"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return json.dumps({**body, "digest": xxh3_128(text.encode()).hexdigest()}).encode()


def entry(**changes: object) -> dict[str, object]:
    return {"path": "a.json", "num_bytes": 3, "xxh3_128": "0" * 32, "blocks": ["1" * 16], **changes}


def test_a_forged_manifest_is_parsed_at_all() -> None:
    assert Manifest.parse(forged(files=[entry()])).files[0].path == "a.json"


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "../x", "a/../../x", "a//b", "a/", "", ".", "./a", "a\\b", "C:\\x", "C:x", "a\0b", "a\nb"),
        *("a\x1b[2Jb", "\u202egnp.exe", "a\ud800", "a" * 256, "manifest.json", 7, None, ["a"]),
    ],
)
def test_a_path_that_leaves_the_checkpoint_is_damage(path: object) -> None:
    with pytest.raises(ManifestError) as caught:
        Manifest.parse(forged(files=[entry(path=path)]))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "files",
    [
        [entry(), entry()],
        [entry(path="a"), entry(path="a/b")],
        [entry(num_bytes=-1)],
        [entry(num_bytes=2**63)],
        [entry(num_bytes=True)],
        [entry(num_bytes=3.0)],
        [entry(num_bytes=BLOCK_BYTES + 1)],
        [entry(blocks=[])],
        [entry(blocks="1" * 16)],
        [entry(blocks=["1" * 15])],
        [entry(xxh3_128="../" + "0" * 29)],
        [entry(xxh3_128=5)],
        [entry(more=1)],
        [{}],
        [None],
        {},
        5,
    ],
)
def test_files_that_cannot_be(files: object) -> None:
    with pytest.raises(ManifestError):
        Manifest.parse(forged(files=files))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "20"},
        {"step": -1},
        {"step": 2**63},
        {"step": True},
        {"world_size": "4"},
        {"metrics": {"loss": "low"}},
        {"metrics": []},
        {"committed_at": "now"},
        {"launch": "../../x"},
        {"launch": "/x"},
        {"launch": 5},
        {"extra": []},
        {"extra": {"declaration": "x"}},
        {"lineage": [{"attempt": "0001-aaaa", "step": 1.5}]},
        {"lineage": [{"attempt": "../0001-aaaa", "step": 1}]},
        {"attempt": "0001-aaaa/.."},
    ],
)
def test_values_of_other_types(changes: dict[str, object]) -> None:
    with pytest.raises(ManifestError):
        Manifest.parse(forged(**changes))


def test_a_manifest_as_deep_as_the_stack() -> None:
    with pytest.raises(ManifestError):
        Manifest.parse(b'{"digest": "", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
