"""What decides the bits of a CPU run, printed as JSON: versions, the processor's instructions, and a digest of torch
alone at work.

Two machines that print the same add and round alike. It imports nothing of outlast, so that a change there cannot pass
for another machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

#: Instructions that nearly every x86 processor has, so that the stored bits hold on more machines than one.
PINNED = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2"}


def numerics() -> dict[str, Any]:
    """What this machine prints with `PINNED` in the environment, from a new process, because torch looks only once."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], env={**os.environ, **PINNED}, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def _digest_of_training() -> str:
    """Of the weights after some steps of a small transformer layer with dropout, in the shapes of the stored run."""
    import torch
    from torch import nn

    torch.manual_seed(3)
    torch.use_deterministic_algorithms(True)
    embedding = nn.Embedding(300, 16)
    layer = nn.TransformerEncoderLayer(16, 2, 64, dropout=0.1, activation=nn.functional.gelu, batch_first=True)
    parameters = [*embedding.parameters(), *layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for step in range(5):
        tokens = (torch.arange(64).reshape(4, 16) * (step + 7)) % 300
        logits = layer(embedding(tokens)) @ embedding.weight.T
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    digest = hashlib.sha256()
    for item in parameters:
        digest.update(item.detach().numpy().tobytes())
    return digest.hexdigest()


def _main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    body = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "training": _digest_of_training(),
    }
    print(json.dumps(body))


if __name__ == "__main__":
    _main()
