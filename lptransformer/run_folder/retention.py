"""Which checkpoints of a run are kept, and what the others take with them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lptransformer import files
from lptransformer.config.load import load
from lptransformer.config.schema import CheckpointSection
from lptransformer.errors import ConfigError, RunError
from lptransformer.run_folder import checkpoint, layout
from lptransformer.run_folder.metrics import MetricsRow

Losses = Mapping[int, float]


@dataclass(frozen=True)
class Listed:
    """A checkpoint: its update, bytes (without frozen weights, which all share), seconds that saving it kept training
    for (where that is known), and what keeps it."""

    update: int
    num_bytes: int
    lost_seconds: float | None
    why: tuple[str, ...]


def reasons(updates: Sequence[int], options: CheckpointSection, losses: Losses) -> dict[int, list[str]]:
    """Of every checkpoint what keeps it, by `checkpoint.keep_*`; the newest is always kept. `losses` are those of
    keep_best, by update."""
    found: dict[int, list[str]] = {update: [] for update in sorted(updates)}
    newest = sorted(updates)[-(options.keep_last or len(updates)) :]
    for update in newest:
        keeps = "keep_last" if options.keep_last else "all are kept"
        found[update].append("the newest" if update == max(updates) else keeps)
    if options.keep_every:
        for update in found:
            if update % options.keep_every == 0:
                found[update].append("keep_every")
    if options.keep_best is not None:
        there = [update for update in found if update in losses]
        if there:
            found[min(there, key=lambda update: (losses[update], update))].append("keep_best")
    return found


def losses_of(rows: Sequence[MetricsRow], name: str | None) -> dict[int, float]:
    """Nats per token of the last exit by update, of a validation set; what is not a number counts as infinite. None
    where no set is named."""
    if name is None:
        return {}
    found = {row["update"]: row["exits"][-1]["nll_per_token"] for row in rows if row.get("evaluation") == name}
    return {update: loss if math.isfinite(loss) else math.inf for update, loss in found.items()}


def listed(run: Path, options: CheckpointSection, losses: Losses) -> list[Listed]:
    """The checkpoints of a run, oldest first."""
    why = reasons(checkpoint.complete_updates(run), options, losses)
    return [
        Listed(update, _bytes(checkpoint.folder_of(run, update)), checkpoint.lost_seconds(run, update), tuple(reason))
        for update, reason in why.items()
    ]


def prune(run: Path, options: CheckpointSection, losses: Losses) -> list[int]:
    """Remove the checkpoints that nothing keeps, and frozen weights that none of the others has. Returns their updates.

    They stop to count at once, and go from the disk then.
    """
    gone = [update for update, why in reasons(checkpoint.complete_updates(run), options, losses).items() if not why]
    for update in gone:
        folder = checkpoint.folder_of(run, update)
        removed = folder.with_name(f".removed-{folder.name}")
        shutil.rmtree(removed, ignore_errors=True)  # of a removal that was interrupted
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
    if gone:
        _remove_frozen(run)
        files.sync(run / "checkpoints")
    return gone


def _remove_frozen(run: Path) -> None:
    """Frozen weights that no checkpoint names, whether it was set aside or not. Where a marker cannot be read, all
    stay."""
    markers = (run / "checkpoints").glob(f"**/step-*/{checkpoint.COMPLETE}")
    try:
        named = {path for marker in markers for path in checkpoint.read_sums(marker.parent, set_aside=True)}
    except RunError:
        return
    for path in (run / "checkpoints").glob("frozen-*.safetensors"):
        if f"../{path.name}" not in named:
            path.unlink()


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def early(losses: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` evaluations were no better than the best before them."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def options(run: Path, overrides: Sequence[str]) -> CheckpointSection:
    """What a run keeps, but for what is typed. Raises RunError and ConfigError."""
    for word in overrides:
        if not word.lstrip("-").startswith("checkpoint.keep_"):
            raise ConfigError(f"{word!r} on the command line: of keys only checkpoint.keep_* have a meaning here")
    layout.read_config(run)
    return load(run / layout.CONFIG, overrides, saved=True).checkpoint


def damaged(run: Path) -> dict[int, str]:
    """What is wrong with the files of checkpoints, by their updates; nothing where all are good."""
    found = {}
    for update in checkpoint.complete_updates(run):
        try:
            layout.refuse_links(run, update)
            checkpoint.check(checkpoint.folder_of(run, update))
        except RunError as error:
            found[update] = str(error)
    return found
