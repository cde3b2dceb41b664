"""README.md of an exported model: what it is, how it was trained, what was measured."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import transformers

from lptransformer import __version__
from lptransformer.config.load import to_yaml
from lptransformer.evaluation.trained_model import RunModel
from lptransformer.run_folder import layout
from lptransformer.run_folder.metrics_log import read_metrics


def text(run: Path, model: RunModel, block: int, dtype: str) -> str:
    """The card of the model up to the exit after `block`."""
    config, blueprint = layout.read_config(run), model.blueprint
    started = json.loads((run / layout.ENVIRONMENT).read_text())
    rows = (
        [row for row in read_metrics(run) if row["update"] == model.update] if (run / "metrics.jsonl").exists() else []
    )
    exits = [(row["evaluation"], exit) for row in rows if "evaluation" in row for exit in row["exits"]]
    measured = [
        f"| {name} | {one['perplexity']:.4g} | {one['bits_per_byte']:.4g} | {one['tokens']} |"
        for name, one in exits
        if one["last_block"] == block
    ]
    depth = blueprint.objective.num_blocks
    part = f"blocks 0 to {block} of {depth}, with the exit behind them" if block + 1 < depth else f"{depth} blocks"
    base = config.model.pretrained
    facts = [
        ("architecture", f"{blueprint.model_config.architectures or [blueprint.model_config.model_type]}".strip("[]'")),
        ("model", part),
        ("started from", "new weights" if base is None else Path(base).name),
        ("trained by", f"{config.objective.name}, {len(blueprint.stages)} stages"),
        ("updates", str(model.update)),
        ("tokens", f"{model.update * blueprint.label_tokens:,}"),
        ("weights here", dtype),
    ]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- local-updates",
        "---",
        "",
    ]
    lines += [f"# {run.absolute().name}", ""]
    lines += [f"Trained with local updates by lptransformer {__version__}. It is an ordinary transformers model:", ""]
    lines += ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    lines += ['model = AutoModelForCausalLM.from_pretrained("FOLDER")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")', "```", ""]
    lines += [
        f"Written by transformers {transformers.__version__}; 4.57 opens it too, where it knows the architecture.",
        "",
    ]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts), ""]
    if measured:
        lines += ["Perplexity on validation sets, disjoint windows of "]
        lines[-1] += f"{blueprint.sequence_length} tokens, no prefix:"
        lines += ["", "| set | perplexity | bits per byte | tokens |", "|---|---:|---:|---:|", *measured, ""]
    commands = [
        shlex.join(one["command"]) for one in started if isinstance(one, dict) and isinstance(one.get("command"), list)
    ]
    if commands:
        lines += ["Started by", "", "```text", *commands, "```", ""]
    lines += ["with the configuration", "", "```yaml", to_yaml(config).rstrip(), "```", ""]
    return "\n".join(lines)
