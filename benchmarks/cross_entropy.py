"""Loss and gradients of an LM head, side by side: logits at once, a loop over chunks, ours, and torch's fused function.

    OMP_NUM_THREADS=1 python benchmarks/cross_entropy.py

Prints the median and the spread of interleaved repetitions, in milliseconds, and whether our bits are the loop's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lptransformer.models.cross_entropy import IGNORE_INDEX, chunked_cross_entropy

ROWS, HIDDEN, VOCABULARY, CHUNK, REPEATS = 1024, 256, 4096, 256, 15
Result = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    labels = torch.randint(0, VOCABULARY, (ROWS,))
    given = torch.randn(ROWS, HIDDEN), torch.randn(VOCABULARY, HIDDEN) * 0.02

    def loop(hidden: Tensor, weight: Tensor, chunk: int) -> Tensor:
        parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
        losses = [F.cross_entropy(F.linear(h, weight), y, ignore_index=IGNORE_INDEX, reduction="sum") for h, y in parts]
        return sum(losses[1:], losses[0])

    methods: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "logits at once": lambda h, w: loop(h, w, ROWS),
        f"loop, {CHUNK} rows": lambda h, w: loop(h, w, CHUNK),
        "ours, one chunk": lambda h, w: chunked_cross_entropy(h, w, labels, 1.0, ROWS)[0],
        f"ours, {CHUNK} rows": lambda h, w: chunked_cross_entropy(h, w, labels, 1.0, CHUNK)[0],
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        methods[f"torch, {CHUNK} rows"] = lambda h, w: F.linear_cross_entropy(
            h, w, labels, reduction="sum", options=options
        )

    def run(method: Callable[[Tensor, Tensor], Tensor]) -> Result:
        hidden, weight = (tensor.clone().requires_grad_() for tensor in given)
        loss = method(hidden, weight)
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        return loss.detach(), hidden.grad, weight.grad

    seconds: dict[str, list[float]] = {name: [] for name in methods}
    results = {name: run(method) for name, method in methods.items()}
    for _ in range(REPEATS):
        for name, method in methods.items():
            started = time.perf_counter()
            run(method)
            seconds[name].append(time.perf_counter() - started)
    sizes = f"{ROWS} rows, hidden {HIDDEN}, vocabulary {VOCABULARY}"
    print(f"{sizes}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    for name, times in seconds.items():
        low, middle, high = (1000 * value for value in (min(times), statistics.median(times), max(times)))
        print(f"{name:20} {middle:7.1f} ms  ({low:.1f} to {high:.1f})")
    same = all(map(torch.equal, results[f"ours, {CHUNK} rows"], results[f"loop, {CHUNK} rows"]))
    print(f"our bits are the loop's: {same}")


if __name__ == "__main__":
    main()
