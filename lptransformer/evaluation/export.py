"""From the stages of a run to a Hugging Face model folder: config, safetensors, tokenizer."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from lptransformer.console import bar
from lptransformer.errors import RunError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.trained_model import RunModel
from lptransformer.models import hf_config
from lptransformer.models.whole_model import whole_model, whole_weights
from lptransformer.run_folder import checkpoint, layout


def export_run(run: Path, out: Path, step: int | None = None) -> int:
    """Write the model of the checkpoint after `step` updates (the newest one by default) to the folder `out`.

    `AutoModelForCausalLM.from_pretrained(out)` is the model up to the last exit, in fp32 and untied, with the logits of
    `RunModel.logits`; auxiliary heads stay behind. Returns the number of updates. The folder appears when it is
    complete. Raises RunError when `out` is a file or not empty, and where the run is missing or damaged.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "is a folder that is not empty" if out.is_dir() else "is a file"
        raise RunError(f"OUT is {out}: that {what}; give a new folder, or an empty one")
    update = trained_model.find_update(run, step)
    tokenizer = run / layout.TOKENIZER
    if not tokenizer.is_dir():
        raise RunError(f"{run} has no folder {layout.TOKENIZER}: a run keeps its tokenizer there")
    with bar("exporting", 2 * len(checkpoint.stage_folders(run, update))) as advance:  # reading, then writing
        _write(trained_model.load(run, update, advance=advance), tokenizer, out)
    return update


def _write(run_parts: RunModel, tokenizer: Path, out: Path) -> None:
    blueprint, of_stages = run_parts.blueprint, [stage.state_dict() for stage in run_parts.stages]
    model = whole_model(blueprint.model_config, whole_weights(blueprint.parts, of_stages))
    unfinished = out.absolute().parent / f".unfinished-{out.absolute().name}-{uuid.uuid4().hex[:12]}"
    try:
        unfinished.mkdir(parents=True)
        for path in tokenizer.iterdir():
            shutil.copyfile(path, unfinished / path.name)
        with hf_config.quiet_transformers():
            model.save_pretrained(unfinished)
        for path in unfinished.iterdir():
            path.chmod(unfinished.stat().st_mode & 0o666)  # safetensors writes files that nobody else may read
        os.rename(unfinished, out)
    except OSError as error:
        raise RunError(f"OUT is {out}: it cannot be written: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
