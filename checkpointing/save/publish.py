"""The published model: the Hugging Face part of a committed checkpoint, in the attempt's `model/`."""

import time
from dataclasses import replace

from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.restore.reader import read_blocks
from outlast.checkpointing.run_store.claims import higher_claim
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.read_back import check_read_back
from outlast.checkpointing.save.writer import write_file


def publish(store: RunStore, attempt: AttemptId, launch: str, source: Manifest, final_step: int) -> str | None:
    """Copy the files, verified while they are read, and then write their manifest.

    Returns the directory; None if the attempt was superseded meanwhile. Raises DamagedError and StorageError.
    """
    target, directory = store.model_dir(attempt), store.checkpoint_dir(source.ref)
    files = []
    for entry in source.files:
        if not layout.is_training_state(entry.path):
            files.append(write_file(store.storage, target, entry.path, read_blocks(store.storage, directory, entry)))
    check_read_back(store.storage, target, files, is_first=False)
    if higher_claim(store, attempt) is not None:
        return None
    now, extra = time.time(), {"final_step": final_step}
    published = replace(source, lineage=(), files=tuple(files), committed_at=now, launch=launch, extra=extra)
    store.storage.put(f"{target}/{layout.MANIFEST}", [published.to_json()])
    return target
