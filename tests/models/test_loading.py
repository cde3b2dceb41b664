"""What a process reads and holds when it loads its stage of a large model folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from transformers import AutoModelForCausalLM, LlamaConfig

from lptransformer.models import hf_config, hf_parts, split

BLOCKS = 6


def folder_of_shards(folder: Path, hidden_size: int, vocab_size: int, *, tied: bool = False) -> Path:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    size = sum(weight.nbytes for weight in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 5)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


class _Slice:
    def __init__(self, of: Any, name: str, read: list[str]) -> None:
        self.of, self.name, self.read = of, name, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)

    def __getitem__(self, index: Any) -> Any:
        self.read.append(self.name)
        return self.of[index]


class _File:
    def __init__(self, of: Any, read: list[str]) -> None:
        self.of, self.read = of, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.of.get_slice(name), name, self.read)


@pytest.mark.parametrize("tied", [False, True])
def test_each_tensor_is_read_by_the_stage_that_owns_it(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied embedding is read by the first stage, and by the last one as its readout."""
    folder = folder_of_shards(tmp_path / "model", 32, 61, tied=tied)
    config = hf_config.read_config(folder)
    parts, read = hf_parts.anatomy(config), []
    opens = transformers.modeling_utils.safe_open
    monkeypatch.setattr(transformers.modeling_utils, "safe_open", lambda *a, **named: _File(opens(*a, **named), read))
    seen: list[str] = []
    for blocks in (range(0, 2), range(2, 5), range(5, 6)):
        read.clear()
        split.load_piece(folder, config, parts, blocks, blocks.start == 0, blocks.stop == BLOCKS)
        own = [f"model.layers.{block}." for block in blocks]
        own += ["model.embed_tokens."] * (blocks.start == 0 or (tied and blocks.stop == BLOCKS))
        own += ["model.norm."] * (blocks.stop == BLOCKS or (tied and blocks.start == 0))  # tied ones: as one
        own += ["lm_head."] * (blocks.stop == BLOCKS)
        assert read and all(name.startswith(tuple(own)) for name in read)
        seen += read
    assert len(seen) - 2 * tied == len(set(seen)) == 9 * BLOCKS + 3 - tied


MEASURE = """
import sys, threading, time
from lptransformer.models import hf_config, hf_parts, split

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

folder, first, end = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = hf_config.read_config(folder)
parts, peak, loading = hf_parts.anatomy(config), anonymous(), True
before = peak

def watch():
    global peak
    while loading:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
piece = split.load_piece(folder, config, parts, range(first, end), first == 0, end == config.num_hidden_layers)
loading = False
thread.join()
own = [*piece.base.parameters(), *(piece.readout.parameters() if piece.readout is not None else ())]
print(peak - before, sum(weight.nbytes for weight in own))
"""


@pytest.mark.slow
def test_no_stage_takes_more_than_its_own_weights_while_it_is_loaded(tmp_path: Path) -> None:
    """160 MB in bf16; in fp32 the embedding and the readout have 66 MB each, a block 26 MB."""
    folder = folder_of_shards(tmp_path / "model", 512, 32_000)
    for first, end in ((2, 3), (5, 6)):
        command = [sys.executable, "-c", MEASURE, str(folder), str(first), str(end)]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        peak, own = map(int, ended.stdout.split())
        assert 0.5 * own < peak < own + 30e6, (first, peak, own)
