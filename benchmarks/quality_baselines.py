"""What the quality study stands beside: n-gram models, and backprop in plain Hugging Face, untied and tied.

    OMP_NUM_THREADS=1 python benchmarks/quality_baselines.py --data.train='BOOKS/train/*.txt' \
        --data.valid='{choose: BOOKS/valid/wuthering-heights.txt}' [--train.learning_rate=8e-3 ...]

Takes the study's configuration (configs/quality.yaml) and overrides of it. The plain loop has the same windows in the
same order, the same optimizer, learning rates and clipping as `objective.name: backprop`, but imports nothing of the
engine; its weights are Hugging Face's own initial ones. Writes docs/benchmarks/quality/baselines.json, which is
extended by every run, and rewrites the tables in docs/benchmarks/quality.md from it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lptransformer.config.checks import micro_batch_size
from lptransformer.config.epochs import steps
from lptransformer.config.load import load
from lptransformer.config.schema import Config
from lptransformer.data.prepare import Prepared, prepare_all
from lptransformer.data.token_set import TokenSet
from lptransformer.data.train_stream import TrainStream
from lptransformer.engine.optimizer import build_lr_scheduler, build_optimizer
from lptransformer.evaluation import ngram
from lptransformer.models.blueprint import make_blueprint
from lptransformer.run_folder.metrics import perplexity, text_counts
from lptransformer.study import markdown_tables
from lptransformer.study.markdown_tables import ResultTable

ROOT = Path(__file__).parents[1]
RESULTS, DOCUMENT = ROOT / "docs/benchmarks/quality/baselines.json", ROOT / "docs/benchmarks/quality.md"
COLUMNS = ("model", "training text", "nats/token", "perplexity", "bits/byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, overrides = parser.parse_known_args()
    torch.set_flush_denormal(True)
    config = load(ROOT / "configs/quality.yaml", overrides)
    data = prepare_all(**config.data.model_dump())
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for row in [*ngrams(data), *(plain(config, data, tied) for tied in (False, True))]:
        found[f"{row['valid']}: {row['model']}, {row['tokens']} tokens"] = row
    RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    markdown_tables.update(DOCUMENT, tables(list(found.values())), "baselines")


def ngrams(data: Prepared) -> list[dict[str, Any]]:
    """Models of the whole training text, for every validation set."""
    train = np.concatenate([chunk for source in data.train for chunk in source.tokens.chunks])
    rows = []
    for name, valid in data.valid.items():
        ids = np.concatenate(valid.chunks)
        for order, model in ngram.NAMES.items():
            nats = ngram.nll(train, ids, data.tokenizer.vocab_size, order)
            rows.append(_row(f"{model} model", len(train), name, valid, nats))
    return rows


def plain(config: Config, data: Prepared, tied: bool) -> dict[str, Any]:
    """Backprop by a plain loop; the loss on the first validation set after the last update."""
    train = config.train
    hf_config = make_blueprint(config, data.tokenizer.vocab_size, data.tokenizer.end_of_text_id).model_config
    hf_config.tie_word_embeddings = tied
    torch.manual_seed(train.seed)
    model = AutoModelForCausalLM.from_config(hf_config)
    optimizer = build_optimizer(model.parameters(), config.optimizer, train.learning_rate)
    lr_scheduler = build_lr_scheduler(optimizer, train, steps(config))
    sources = [source.tokens for source in data.train]
    stream = TrainStream(sources, None, seed=train.seed, micro_batch_size=micro_batch_size(config))
    started = time.perf_counter()
    for update in range(steps(config)):
        for number in range(train.micro_batches_per_update):
            ids = stream.batch(update * train.micro_batches_per_update + number).input_ids
            (model(ids, labels=ids).loss / train.micro_batches_per_update).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
    name, valid = next(iter(data.valid.items()))
    label = f"backprop in plain Hugging Face, {'tied' if tied else 'untied'}, learning rate {train.learning_rate}, "
    row = _row(label + f"seed {train.seed}", _positions(config), name, valid, _evaluate(model, valid, config))
    return {**row, "seconds": round(time.perf_counter() - started)}


def _positions(config: Config) -> int:
    train = config.train
    rows = steps(config) * train.micro_batches_per_update * micro_batch_size(config)
    return rows * (config.data.sequence_length - 1)


@torch.no_grad()
def _evaluate(model: torch.nn.Module, valid: TokenSet, config: Config) -> float:
    total, label_tokens = 0.0, 0
    for batch in valid.batches(micro_batch_size(config)):
        logits = model(batch.input_ids).logits.flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="sum").item()
        label_tokens += batch.label_tokens
    return total / label_tokens


def _row(model: str, tokens: int, name: str, valid: TokenSet, nats: float) -> dict[str, Any]:
    counts = text_counts(valid.manifest)
    bits = perplexity(nats * counts.tokens, counts.tokens, counts).bits_per_byte
    return {"model": model, "tokens": tokens, "valid": name, "nats": round(nats, 5), "bits_per_byte": round(bits, 5)}


def tables(rows: list[dict[str, Any]]) -> list[ResultTable]:
    """One table for every validation set."""
    return [
        ResultTable(
            name,
            f"{name}: models beside the study",
            COLUMNS,
            tuple(
                (
                    row["model"],
                    f"{row['tokens'] / 1e6:.2f}M tokens",
                    f"{row['nats']:.4f}",
                    f"{math.exp(row['nats']):.3f}",
                    f"{row['bits_per_byte']:.4f}",
                )
                for row in rows
                if row["valid"] == name
            ),
        )
        for name in dict.fromkeys(row["valid"] for row in rows)
    ]


if __name__ == "__main__":
    main()
