"""What the fork server of the sweep imports: everything that a first attempt would import lazily, a second of CPU each.

It makes no gradient and no thread: forked processes could not use either.
"""

from __future__ import annotations

import importlib
import tempfile
from typing import Any

import torch
import transformers

import tests.support.architectures.rank  # noqa: F401

for name in ("pandas", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.elastic.agent.server.api"):
    importlib.import_module(name)

torch.set_num_threads(1)
_config = transformers.AutoConfig.for_model("gpt2", n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=16)
_model: Any = transformers.AutoModelForCausalLM.from_config(_config)
torch.optim.AdamW(_model.parameters())
with tempfile.TemporaryDirectory() as _folder:
    _model.save_pretrained(_folder)
    transformers.AutoModelForCausalLM.from_pretrained(_folder)
