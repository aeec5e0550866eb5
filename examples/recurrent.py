"""A model class of one's own: a transformer with a segment memory, as Transformer-XL has it (arxiv.org/abs/1901.02860).

    outlast train examples/recurrent.yaml

The run file names it as `class: recurrent:RecurrentLM`; Python finds it because it lies beside the run file. Each layer
attends to its segment and to what it held of the segment before; no gradient goes there.

With `carry: false` the memory begins empty in each call, and a sample of `max_length` tokens is read in segments: what
a call computes follows from its sample alone. With `carry: true` the last memory stays in a buffer, and the next
micro-batch of the same rank begins with it. Buffers are part of the model's state: they are in every checkpoint, so a
killed run goes on with the memory that it had. docs/how-to/tasks.md says what that means for other numbers of workers.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class RecurrentConfig(PreTrainedConfig):
    """Sizes. `memory` is how many places of the segment before a layer sees, `segment` how long a segment is."""

    model_type = "recurrent"

    def __init__(
        self,
        vocab_size: int = 256,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        segment: int = 16,
        memory: int = 16,
        dropout: float = 0.1,
        carry: bool = False,
        **others,
    ) -> None:
        super().__init__(**others)
        self.vocab_size, self.width, self.num_layers, self.num_heads = vocab_size, width, num_layers, num_heads
        self.segment, self.memory, self.dropout, self.carry = segment, memory, dropout, carry


class Layer(nn.Module):
    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.mix = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        # How far back a place lies counts, not where it is: a bias for each head and distance.
        self.distance = nn.Parameter(torch.zeros(config.num_heads, config.segment + config.memory))

    def forward(self, here: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """`here` [samples, places, width], `memory` [samples or 1, places before, width]."""
        num_samples, length, width = here.shape
        seen = self.before(torch.cat([memory.expand(num_samples, -1, -1), here], dim=1))
        query = self._by_head(self.query(seen[:, -length:]))
        key, value = (self._by_head(part) for part in self.key_value(seen).chunk(2, dim=-1))
        back = torch.arange(length)[:, None] + seen.shape[1] - length - torch.arange(seen.shape[1])[None]
        bias = self.distance[:, back.clamp(0, self.distance.shape[1] - 1)]
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
        weights = scores.masked_fill((back < 0).to(scores.device), -torch.inf).softmax(-1)
        mixed = (functional.dropout(weights, self.dropout, self.training) @ value).transpose(1, 2)
        here = here + self.out(mixed.reshape(num_samples, length, width))
        return here + functional.dropout(self.mix(self.between(here)), self.dropout, self.training)

    def _by_head(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class RecurrentLM(PreTrainedModel):
    config_class = RecurrentConfig

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.carry:  # of one stream: the last sample's
            self.register_buffer("memory", torch.zeros(config.num_layers, config.memory, config.width))
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_) -> CausalLMOutput:
        config = self.config
        empty = torch.zeros(config.num_layers, 1, 0, config.width, device=input_ids.device)
        memories = list(self.memory[:, None].clone() if config.carry and self.training else empty)
        hidden = []
        for tokens in input_ids.split(config.segment, dim=1):
            here = self.embed(tokens)
            for number, layer in enumerate(self.layers):
                before = memories[number]
                wider = torch.cat([before.expand(len(here), -1, -1), here.detach().to(before.dtype)], dim=1)
                memories[number] = wider[:, -config.memory :]
                here = layer(here, before)
            hidden.append(here)
        if config.carry and self.training:  # evaluation leaves no trace
            with torch.no_grad():
                self.memory.copy_(torch.stack([memory[-1] for memory in memories]))
        return CausalLMOutput(logits=self.head(self.norm(torch.cat(hidden, dim=1))))
