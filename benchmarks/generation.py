"""Self-speculative decoding: tokens per second when an earlier exit drafts, beside ordinary greedy decoding.

    python benchmarks/pretrained.py smollm2
    OMP_NUM_THREADS=1 python benchmarks/generation.py smollm2

writes docs/benchmarks/generation.{json,md}. It goes on where it was stopped: a case that the JSON has is not measured
again, unless something else was asked for. Per case an exit of the model drafts, after each quarter of its blocks but
the last, and the whole model verifies:

- trained heads: a short local-update run from the model (chunked, four chunks, private heads), whose own last
  exit verifies; its blocks are trained too, so that is another model than the folder's;
- logit lens: the folder's norm and readout behind the block;
- fitted lens: the readout of W norm(h) + b, where W and b are a ridge regression of the last normed rows on the normed
  hidden states of the block: a head of the kind `fitted` before it is trained.

A drafted and an ordinary answer to the same prompt follow each other, in turn which is first. Prompts are passages of a
novel that no run has seen. What limits the speed is modelled from the seconds of single passes, measured apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.evaluation.generate import Source, generate, open_source
from lptransformer.files import write_text
from lptransformer.methods import objectives
from lptransformer.models import hf_config, hf_parts
from lptransformer.models.head import FittedMap
from lptransformer.models.split import new_head
from lptransformer.processes import use_fair_share_of_cores
from lptransformer.run_folder import history
from lptransformer.study.markdown_tables import ResultTable, update

ROOT = Path(__file__).parents[1]
TRAINED_ON, HELD_OUT = ROOT / "data/books/train/frankenstein.txt", ROOT / "data/books/valid/wuthering-heights.txt"
HEADS, LENS, FITTED = ("private",), "logit lens", "fitted lens"
CHUNKS, WARM_TOKENS, PASSES = 4, 4, 25
FULL = {"prompts": 20, "prompt_tokens": 32, "tokens": 64, "draft_tokens": 4, "updates": 40, "window": 256}
FULL |= {"fit_tokens": 8192}
TINY = {
    "prompts": 2,
    "prompt_tokens": 8,
    "tokens": 12,
    "draft_tokens": 2,
    "updates": 2,
    "window": 16,
    "fit_tokens": 256,
}
Settings = dict[str, int]


def plain_norm(source: Source) -> nn.Module:
    """The model's final norm as the family begins it."""
    return new_head(source.model.config, hf_parts.anatomy(source.model.config), 0, 0).norm


@torch.no_grad()
def fit(source: Source, blocks: Sequence[int], settings: Settings) -> dict[int, FittedMap]:
    """What stands for the final norm in the exit after every block."""
    parts = hf_parts.anatomy(source.model.config)
    norm, given = source.model.get_submodule(parts.norm), {block: list[Tensor]() for block in (*blocks, -1)}

    def keep(block: int, out: Any) -> None:
        given[block].append((out if isinstance(out, Tensor) else out[0]).flatten(0, -2))

    hooks = [norm.register_forward_hook(lambda module, args, out: keep(-1, out))]
    for block in blocks:
        module = source.model.get_submodule(f"{parts.blocks}.{block}")
        hooks.append(module.register_forward_hook(lambda module, args, out, block=block: keep(block, out)))
    ids = torch.tensor(source.tokenizer.encode(TRAINED_ON.read_text())[: settings["fit_tokens"]])
    for window in ids.split(settings["window"]):
        source.model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    last, maps = torch.cat(given[-1]), {}
    for block in blocks:
        maps[block] = FittedMap(plain_norm(source), parts.hidden_size, residual=False)
        maps[block].fit(torch.cat(given[block]), last)
    return maps


def train(model: Path, head: str, run: Path, settings: Settings) -> Path:
    """The run folder of a short local-update run; one that is finished stays as it is."""
    if history.read_end(run) == "finished":
        return run
    keys = {
        "model.pretrained": model,
        "data.train": TRAINED_ON,
        "data.sequence_length": settings["window"],
        "data.cache": run.parent / "cache",
        "objective.name": "chunked",
        "objective.chunks": CHUNKS,
        "head.kind": head,
        "train.steps": settings["updates"],
        "train.micro_batch_size": 2,
        "train.micro_batches_per_update": 1,
        "train.learning_rate": 1e-4,
        "train.lr_scheduler": "constant",
        "run.dir": run,
    }
    flags = [f"--{key}={value}" for key, value in keys.items()]
    subprocess.run([sys.executable, "-m", "lptransformer", "train", "--overwrite", *flags], check=True, cwd=ROOT)
    return run


def tiny_model(folder: Path) -> Path:
    """A random model on bytes, of eight blocks."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_layers": 8, "num_heads": 4, "vocab_size": 259, "intermediate_size": 48}
        config = hf_config.new_config(
            "llama", **sizes, num_key_value_heads=2, max_position_embeddings=128, end_of_text_id=1
        )
        hf_config.model_class(config)(config).save_pretrained(folder)
        load_tokenizer("bytes").save(folder)
    return folder


# ---- one case


def passages(source: Source, settings: Settings) -> list[list[int]]:
    """Ids of passages that stand evenly over the novel."""
    ids = source.tokenizer.encode(HELD_OUT.read_text()).tolist()
    starts = range(0, len(ids) - settings["prompt_tokens"], len(ids) // settings["prompts"])[: settings["prompts"]]
    return [ids[start : start + settings["prompt_tokens"]] for start in starts]


def measure(source: Source, settings: Settings) -> dict[str, Any]:
    """By prompt: what an ordinary and a drafted answer took."""
    prompts, ways = passages(source, settings), {"ordinary": replace(source, draft=None), "drafted": source}
    for way in ways.values():
        generate(way, prompts[0], WARM_TOKENS)
    rows = []
    for number, prompt in enumerate(prompts):
        order = list(ways) if number % 2 == 0 else list(ways)[::-1]
        answers = {name: generate(ways[name], prompt, settings["tokens"]) for name in order}
        drafted = answers["drafted"]
        row = {"tokens": len(drafted.ids), "same": drafted.ids == answers["ordinary"].ids}
        row |= {"passes": drafted.passes, "drafted": drafted.drafted, "accepted": drafted.accepted}
        rows.append(row | {f"{name} tokens/s": answers[name].tokens_per_second for name in ways})
    return {"prompts": rows, "pass_seconds": pass_seconds(source, settings)}


@torch.no_grad()
def pass_seconds(source: Source, settings: Settings) -> dict[str, float]:
    """Medians of single passes behind a cache, interleaved: a token of the model, all that it verifies, a token of the
    draft."""
    behind, several = settings["prompt_tokens"] + settings["tokens"] // 2, settings["draft_tokens"] + 1
    ids, taken = torch.arange(behind + several)[None] % 100 + 3, dict[str, list[float]]()
    kinds = {"token": (source.model, 1), "verify": (source.model, several), "draft": (source.draft, 1)}
    caches = {name: model(ids[:, :behind]).past_key_values for name, (model, _) in kinds.items()}
    for _ in range(PASSES):
        for name, (model, tokens) in kinds.items():
            started = time.perf_counter()
            model(ids[:, behind : behind + tokens], past_key_values=caches[name])
            taken.setdefault(name, []).append(time.perf_counter() - started)
            caches[name].crop(-tokens)
    return {name: statistics.median(times) for name, times in taken.items()}


# ---- all of them


def measure_all(model: Path, work: Path, numbers: Path, settings: Settings, heads: Sequence[str]) -> None:
    """Fill the JSON, case by case."""
    about = {"model": model.name, "settings": settings, "machine": machine()}
    found: dict[str, Any] = {**about, "cases": {}}
    if numbers.is_file():
        before = json.loads(numbers.read_text())
        if all(before[key] == about[key] for key in ("model", "settings", "machine")):
            found["cases"] = before["cases"]
    depth = hf_config.read_config(model).num_hidden_layers
    spans = objectives.build(depth, name="chunked", chunks=CHUNKS).usual.spans
    blocks = [span.last for span in spans][:-1]
    fitted: dict[int, FittedMap] = {}
    for drafter in (LENS, FITTED, *(f"{head} heads, trained" for head in heads)):
        for block in blocks:
            name = f"{drafter}, block {block}"
            if name in found["cases"]:
                continue
            head = drafter.partition(" ")[0]
            folder = train(model, head, work / f"run-{head}", settings) if head in heads else model
            source = open_source(folder, draft_block=block, draft_tokens=settings["draft_tokens"])
            if drafter == FITTED:
                fitted = fitted or fit(source, blocks, settings)
                place, draft = hf_parts.anatomy(source.model.config).norm, source.draft
                assert draft is not None
                draft.set_submodule(place, fitted[block])
            case = {"drafter": drafter, "block": block, "blocks": depth, **measure(source, settings)}
            found["cases"][name] = case
            write_text(numbers, json.dumps(found, indent=1) + "\n")
            print(name, {key: round(value, 3) for key, value in summary(case, settings).items()}, file=sys.stderr)


def machine() -> str:
    cpu = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{cpu[0] if cpu else platform.machine()}, {torch.get_num_threads()} thread(s), fp32, {versions}"


def summary(case: dict[str, Any], settings: Settings) -> dict[str, float]:
    """The numbers of the tables. `expected` is the ratio if nothing took time but the passes that were made, `at best`
    if every drafted token were accepted too."""
    rows, seconds, drafted = case["prompts"], case["pass_seconds"], settings["draft_tokens"]
    total = {key: sum(row[key] for row in rows) for key in ("tokens", "passes", "drafted", "accepted")}
    draft, verify = seconds["draft"] / seconds["token"], seconds["verify"] / seconds["token"]
    by_way = {way: statistics.median(row[f"{way} tokens/s"] for row in rows) for way in ("ordinary", "drafted")}
    return {
        "acceptance": total["accepted"] / max(1, total["drafted"]),
        "tokens per pass": total["tokens"] / total["passes"],
        **by_way,
        "ratio": statistics.median(row["drafted tokens/s"] / row["ordinary tokens/s"] for row in rows),
        "same": sum(row["same"] for row in rows),
        "draft cost": draft,
        "verify cost": verify,
        "expected": total["tokens"] / (total["drafted"] * draft + total["passes"] * verify),
        "at best": (drafted + 1) / (drafted * draft + verify),
    }


def tables(found: dict[str, Any]) -> list[ResultTable]:
    settings, speed, limits = found["settings"], [], []
    for case in found["cases"].values():
        one = summary(case, settings)
        start = (case["drafter"], f"{case['block']} of {case['blocks']}")
        numbers = [
            f"{one['acceptance']:.1%}",
            *(f"{one[key]:.2f}" for key in ("tokens per pass", "ordinary", "drafted")),
        ]
        same = f"{one['same']:.0f} of {len(case['prompts'])}"
        speed.append((*start, *numbers, f"{one['ratio']:.2f}", same))
        of_passes = ("draft cost", "verify cost", "tokens per pass", "expected", "ratio", "at best")
        limits.append((*start, *(f"{one[key]:.2f}" for key in of_passes)))
    text = "{prompts} prompts of {prompt_tokens} tokens, up to {tokens} new ones, {draft_tokens} drafted per pass"
    title = f"{found['model']}, {text.format(**settings)}; {found['machine']}"
    columns = ("drafter", "exit after block", "accepted", "tokens per pass", "tokens/s, ordinary", "tokens/s, drafted")
    model = ("drafter", "exit after block", "c: a draft's token", "v: verifying", "tokens per pass")
    return [
        ResultTable("generation", title, (*columns, "ratio", "same output"), tuple(speed)),
        ResultTable(
            "generation-limits",
            "Seconds of passes over those of a token's; expected ratio = tokens / (drafted tokens x c + passes x v)",
            (*model, "expected ratio", "measured ratio", "all accepted"),
            tuple(limits),
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="folder of a Hugging Face model (benchmarks/pretrained.py)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "generation", help="folder for the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of generation.{json,md}")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model and few tokens: whether it runs")
    parser.add_argument("--tables", action="store_true", help="the tables again, from the JSON")
    args = parser.parse_args(arguments)
    numbers = args.out / "generation.json"
    if not args.tables:
        if (args.model is None) != args.tiny:
            parser.error("give the folder of a model, or --tiny")
        use_fair_share_of_cores()
        args.work.mkdir(parents=True, exist_ok=True)
        model = tiny_model(args.work / "tiny") if args.tiny else args.model.absolute()
        measure_all(model, args.work.absolute(), numbers, TINY if args.tiny else FULL, HEADS)
    update(args.out / "generation.md", tables(json.loads(numbers.read_text())))


if __name__ == "__main__":
    main()
