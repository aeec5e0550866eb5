"""On what the bits of torch's operations depend on a CPU, as `docs/explanation/exactness.md` says: a minute.

    python -m benchmarks.numerics

The same operations on the same numbers: at other addresses, with other numbers of threads, beside other rows, and with
other kernels. Prints how many give other bits. It needs nothing of outlast.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

OPERATIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    "linear": tuple((rows, *size) for rows in (1, 8, 64, 512) for size in ((32, 32), (384, 384), (576, 1536))),
    "layer norm": tuple((rows, width) for rows in (8, 64, 512) for width in (32, 384, 576)),
    "softmax": tuple((rows, width) for rows in (8, 64, 512) for width in (32, 384, 576)),
    "gelu": tuple((rows, width) for rows in (8, 64, 512) for width in (32, 384, 576)),
    "sum": ((1_000,), (100_000,), (5_000_000,)),
    "cross-entropy": ((64, 500), (512, 8_000)),
    "embedding": ((64, 500, 32), (4_096, 8_000, 384)),
    "attention": ((1, 4, 48, 8), (4, 6, 128, 64)),
}


def digests() -> dict[str, str]:
    """Digest of each operation's result and of each one's gradients, by name and shape."""
    random = torch.Generator().manual_seed(0)
    found = {}
    for name, shapes in OPERATIONS.items():
        for shape in shapes:
            for direction, tensors in zip(("", " backward"), _both(name, shape, random), strict=False):
                digest = hashlib.sha256(b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors))
                found[f"{name}{direction} {shape}"] = digest.hexdigest()
    return found


def _both(name: str, shape: tuple[int, ...], random: torch.Generator) -> Iterator[list[Tensor]]:
    """The result, then the gradients of the inputs."""

    def new(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, requires_grad=True)

    rows, last = shape[0], shape[-1]
    inputs: list[Tensor]
    if name == "linear":
        inputs = [new(*shape[:2]), new(shape[2], shape[1])]
        result = functional.linear(*inputs)
    elif name == "layer norm":
        inputs = [new(*shape), new(last)]
        result = functional.layer_norm(inputs[0], (last,), inputs[1])
    elif name == "cross-entropy":
        inputs = [new(*shape)]
        result = functional.cross_entropy(inputs[0], torch.arange(rows) % last, reduction="sum")
    elif name == "embedding":
        inputs = [new(*shape[1:])]
        result = functional.embedding(torch.arange(rows) % 97, inputs[0])
    elif name == "attention":
        inputs = [new(*shape) for _ in range(3)]
        result = functional.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], is_causal=True)
    else:
        plain: dict[str, Callable[[Tensor], Tensor]] = {
            "softmax": lambda x: torch.softmax(x, -1),
            "gelu": functional.gelu,
            "sum": torch.sum,
        }
        yield [plain[name](new(*shape))]
        return
    yield [result]
    yield list(torch.autograd.grad(result, inputs, torch.randn(result.shape, generator=random)))


def in_new_process(threads: int = 1, **environment: str) -> dict[str, str]:
    command = [sys.executable, "-m", "benchmarks.numerics", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return dict(json.loads(done.stdout))


def at_other_addresses(rows: int) -> str:
    """A linear layer whose matrix lies up to 60 bytes past a multiple of 64."""
    other: Counter[str] = Counter()
    shapes = [(inputs, outputs) for inputs in (16, 32, 37, 64, 384, 576) for outputs in (2, 3, 32, 37, 64, 384)]
    for inputs, outputs in shapes:
        x, matrix = torch.randn(rows, inputs), torch.randn(outputs, inputs)
        results = []
        for offset in range(16):
            memory = torch.empty(matrix.numel() + 32)
            start = (-memory.data_ptr() // 4) % 16 + offset
            moved = memory[start : start + matrix.numel()].view(matrix.shape).copy_(matrix)
            results.append(functional.linear(x, moved))
        differing = [4 * offset for offset, result in enumerate(results) if not torch.equal(result, results[0])]
        if differing:
            other[f"{'2 or 3' if outputs < 32 else '32 or more'} outputs, offsets {differing}"] += 1
    return f"{sum(other.values())} of {len(shapes)} {dict(other)}"


def beside_other_rows(num_texts: int = 50) -> tuple[int, int]:
    """How many texts get other logits of a small BERT: padded by 16 tokens; with three more rows."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=500
    )
    model = transformers.BertForSequenceClassification(config).eval()
    padded = beside = 0
    for length in range(5, 5 + num_texts):
        ids = torch.randint(5, 500, (1, length))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            alone = model(input_ids=ids, attention_mask=mask).logits
            more = model(input_ids=functional.pad(ids, (0, 16)), attention_mask=functional.pad(mask, (0, 16))).logits
            four = model(input_ids=ids.repeat(4, 1), attention_mask=mask.repeat(4, 1)).logits[:1]
        padded += not torch.equal(alone, more)
        beside += not torch.equal(alone, four)
    return padded, beside


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()} kernels")
    for rows in (1, 2, 8):
        print(f"linear, {rows} rows, at other addresses: {at_other_addresses(rows)}")
    print("of 50 texts, padded and beside three others: {} and {}".format(*beside_other_rows()))
    here = in_new_process()
    ways: dict[str, tuple[int, dict[str, str]]] = {
        "again": (1, {}),
        "2 threads": (2, {}),
        "4 threads": (4, {}),
        **{
            f"{key}={value}": (1, {key: value})
            for key, value in (
                ("ATEN_CPU_CAPABILITY", "avx2"),
                ("ONEDNN_MAX_CPU_ISA", "AVX2"),
                ("MKL_CBWR", "COMPATIBLE"),
            )
        },
    }
    for way, (threads, environment) in ways.items():
        there = in_new_process(threads, **environment)
        other = Counter(name.split(" (")[0] for name in here if there[name] != here[name])
        print(f"{way}: {sum(other.values())} of {len(here)} {dict(other)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
        print(json.dumps(digests()))
    else:
        main()
