"""README.md of an exported model: what it is, how it was trained, what was measured."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lptransformer import __version__
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.data.windows import WindowOptions
from lptransformer.evaluation.trained_model import RunModel
from lptransformer.run_folder import history, layout
from lptransformer.run_folder.metrics_log import JSONL_NAME, read_metrics

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- local-updates
---

# {name}

Trained with local updates by lptransformer {version}. It is an ordinary model of transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

Written by transformers {transformers}; 4.57 opens it too, where it knows the architecture.

{facts}
{measured}
The command and the configuration:

```text
{commands}
```

```yaml
{configuration}
```
"""


def text(run: Path, model: RunModel, block: int, dtype: str) -> str:
    """The card of the model up to the exit after `block`."""
    config, blueprint = layout.read_config(run), model.blueprint
    depth, pretrained = blueprint.objective.num_blocks, config.model.pretrained
    facts = {
        "architecture": ", ".join(blueprint.model_config.architectures or [blueprint.model_config.model_type]),
        "blocks": f"{depth}" if block + 1 == depth else f"{block + 1} of {depth}, with the exit behind them",
        "started from": "new weights" if pretrained is None else history.public_name(run, pretrained),
        "trained by": f"{config.objective.name}, {len(blueprint.stages)} stages",
        "updates": model.update,
        "tokens": f"{model.update * blueprint.label_tokens:,}",
        "weights": dtype,
    }
    rows = read_metrics(run) if (run / JSONL_NAME).is_file() else []
    measured = [
        (row["evaluation"], f"{one['perplexity']:.4g}", f"{one['bits_per_byte']:.4g}", one["tokens"])
        for row in rows
        if "evaluation" in row and row["update"] == model.update
        for one in row["exits"]
        if one["last_block"] == block
    ]
    starts = history.read_starts(run)
    return _CARD.format(
        name=run.absolute().name,
        version=__version__,
        transformers=importlib.metadata.version("transformers"),
        facts="\n".join(_table(("", ""), list(facts.items()))),
        measured="\n".join(_measured(measured, blueprint.sequence_length, _prefix(run, config.data.bos))),
        commands="\n".join(_typed(start["command"]) for start in starts),
        configuration=re.sub(r"^ *#.*\n| +# .*", "", (run / layout.CONFIG).read_text(), flags=re.M).rstrip(),
    )


def _prefix(run: Path, bos: str) -> str:
    """What stands before every document that was measured."""
    tokenizer = load_tokenizer(run / layout.TOKENIZER)
    return (
        f"`{tokenizer.backend.bos_token}` before every document"
        if WindowOptions(bos=bos).begins(tokenizer)
        else "no prefix"
    )


def _measured(rows: Sequence[Sequence[Any]], window: int, prefix: str) -> Iterator[str]:
    if rows:
        yield f"\nPerplexity on validation sets, disjoint windows of {window} tokens, {prefix}:\n"
        yield from _table(("set", "perplexity", "bits per byte", "tokens"), rows)
        yield ""


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(map(str, row))} |"


def _typed(words: Sequence[str]) -> str:
    """A command as a person types it."""
    program, script, *arguments = words
    own = Path(script).name in ("__main__.py", "lptransformer")
    return f"{history.program(script) if own else f'{program} {script}'} {shlex.join(arguments)}"
