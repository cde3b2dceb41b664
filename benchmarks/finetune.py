"""Fine-tuning a pretrained model: recipes beside backprop at equal tokens, on new text and on old.

    python benchmarks/pretrained.py smollm2
    nice python benchmarks/finetune.py --model smollm2 --books DIR --chat DIR --old FILE --out SCRATCH

trains the runs of the study (`--list` shows them), two at a time, each in a process with one thread, and writes a
record of each into docs/benchmarks/finetune/. A run that has a record is never repeated, so the same command goes on
where it was stopped; a run that was interrupted begins anew. Which rate and which recipe the later parts take is
decided on the text to choose by, when the part before is there. `--report` writes docs/benchmarks/finetune.md and its
picture from the records.

DIR of --books holds moby-dick*.txt and little-dorrit*.txt, that of --chat train.jsonl and valid.jsonl with the fields
prompt and completion, which are read as plain text; FILE is a text that the model may have seen the like of.
Held out are the last tokens of a novel (of the chat, of valid.jsonl): what is reported, and before it what rates are
chosen by. Windows of 512 tokens, one to an update; fp32, AdamW without decay, 5 updates of warm-up, cosine, clipping
at 1. No weights are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import finetune_prototypes as prototypes
import finetune_report
import psutil
import torch
from finetune_report import BACKPROP, BEFORE, COPIED, NOVEL, PIPELINED, SETS, Record
from torch import Tensor

import lptransformer
from lptransformer.config.load import load
from lptransformer.config.schema import Config
from lptransformer.data.token_set import IGNORE_INDEX
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.engine.deepspeed_stage import TrainedStage
from lptransformer.engine.engine import LocalUpdateEngine
from lptransformer.files import write_text
from lptransformer.methods import flops, objectives
from lptransformer.methods.dtypes import DTYPES
from lptransformer.models import hf_config
from lptransformer.models.blueprint import Blueprint, make_blueprint
from lptransformer.models.stage import Stage, make_stage
from lptransformer.planning.stage_memory import EmptyStages
from lptransformer.planning.stage_state import precision
from lptransformer.processes import use_fair_share_of_cores

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "benchmarks"
OTHERS = ("little-dorrit", "chat")
FINALISTS = ("chunked-2-fitted-10-trained", "chunked-2-fitted-10-trained-middle", "chunked-4-fitted-10-trained")
RATE, RATES, SEEDS = 1e-4, (5e-5, 1e-4, 2e-4), (0, 1, 2)
MUON_RATES = (RATE, 4 * RATE)  # the first steps of AdamW have size 1, those of Muon 0.2
HELD_CHARACTERS = 7  # per token that is held out, at most


@dataclass(frozen=True)
class Sizes:
    """Tokens of a window, windows of what is held out, updates of short, middling and long runs."""

    window: int = 512
    choose: int = 16
    report: int = 32
    old: int = 32
    short: int = 40
    middling: int = 120
    long: int = 400


TINY = Sizes(window=32, choose=2, report=3, old=2, short=3, middling=4, long=5)


# ---- what is run


@dataclass(frozen=True)
class Recipe:
    """Keys of the configuration; the pipeline ranks that its memory and traffic are predicted on, one per chunk (of
    backprop as many as there are chunks beside it); the rates of its short runs."""

    keys: dict[str, Any]
    ranks: tuple[int, ...] = (2,)
    prototype: str | None = None
    rates: tuple[float, ...] = (RATE,)


def recipes(depth: int) -> dict[str, Recipe]:
    """By name; the numbers in the names are those of a model of 30 blocks, others have the same shares."""

    def chunked(chunks: int | list[int], blocks: int, trained: bool, **more: Any) -> dict[str, Any]:
        keys: dict[str, Any] = {"objective.name": "chunked", "objective.chunks": chunks}
        of_model = max(1, round(blocks * depth / 30)) if blocks else 0
        keys |= {"head.kind": "fitted", "head.blocks": of_model, "head.train_blocks": trained}
        return keys | {key.replace("__", "."): value for key, value in more.items()}

    ten, backprop = chunked(2, 10, True), {"objective.name": "backprop"}
    middle = [depth - depth // 2, depth // 2]
    return {
        "backprop-tied": Recipe(backprop | {"model.tie": "keep"}, ranks=(1,)),
        BACKPROP: Recipe(backprop, ranks=(1, 2, 4)),
        "chunked-2-fitted-0": Recipe(chunked(2, 0, False)),
        "chunked-2-fitted-3-trained": Recipe(chunked(2, 3, True)),
        "chunked-2-fitted-6-frozen": Recipe(chunked(2, 6, False)),
        "chunked-2-fitted-9-trained": Recipe(chunked(2, 9, True)),
        "chunked-2-fitted-10-frozen": Recipe(chunked(2, 10, False)),
        "chunked-2-fitted-10-trained": Recipe(ten),
        "chunked-2-fitted-10-trained-middle": Recipe(chunked(middle, 10, True)),
        "chunked-4-fitted-6-trained": Recipe(chunked(4, 6, True), ranks=(4,)),
        "chunked-4-fitted-10-trained": Recipe(chunked(4, 10, True), ranks=(4,)),
        "overlapping-4-fitted-6-frozen": Recipe(
            chunked(4, 6, False, objective__name="overlapping", objective__overlap=1), ranks=(4,)
        ),
        COPIED: Recipe(
            {"objective.name": "chunked", "objective.chunks": 2, "head.kind": "private", "head.init": "model"}
        ),
        "delayed-2": Recipe({"objective.name": "delayed", "objective.chunks": 2}),
        "hybrid-2-fitted-0": Recipe(chunked(2, 0, False, objective__backprop_every=2)),
        "distilled-2-fitted-10-trained": Recipe(ten, prototype=prototypes.DISTILLED),
        "lora-below-2-fitted-10-trained": Recipe(ten, prototype=prototypes.LORA),
        "muon-2-fitted-10-trained": Recipe(ten, prototype=prototypes.MUON, rates=MUON_RATES),
        "muon-backprop": Recipe(backprop, ranks=(2,), prototype=prototypes.MUON, rates=MUON_RATES),
    }


class Run(NamedTuple):
    recipe: str
    corpus: str
    updates: int = 0
    rate: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        if self.recipe == BEFORE:
            return f"{BEFORE}-{self.corpus}"
        return f"{self.recipe}-{self.corpus}-{self.updates}-{self.rate:g}-{self.seed}"


@dataclass
class Study:
    """Where things are, and how much of them."""

    model: Path
    books: Path
    chat: Path
    old: Path
    out: Path
    folder: Path = FOLDER
    sizes: Sizes = field(default_factory=Sizes)
    activations: dict[tuple[str, int], Record] = field(default_factory=dict)  # by recipe and ranks, once predicted

    @property
    def records(self) -> Path:
        return self.folder / "finetune"

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        return recipes(hf_config.read_config(self.model).num_hidden_layers)

    def is_done(self, run: Run) -> bool:
        """Whether there is a record of the run; ends the program where that is one of another model or setting."""
        path = self.records / f"{run.name}.json"
        if not path.is_file():
            return False
        found, keys = json.loads(path.read_text()), self.recipes.get(run.recipe, Recipe({})).keys
        own = {"model": self.model.name, "window": self.sizes.window, "keys": keys}
        if other := [name for name, value in own.items() if found[name] != value]:
            raise SystemExit(f"{path} is of another {' and '.join(other)}: move it away, or give what it was made with")
        return True

    def parts(self) -> Iterator[list[Run]]:
        """The runs of the study, part by part; what the last one takes is known when the second is done."""
        sizes = self.sizes
        short = [(name, rate) for name, recipe in self.recipes.items() for rate in recipe.rates]
        yield [Run(BEFORE, NOVEL), *(Run(name, NOVEL, sizes.short, rate) for name, rate in short)]
        second = [Run(BACKPROP, NOVEL, sizes.middling, rate) for rate in RATES]
        second += [Run(recipe, NOVEL, sizes.middling, RATE) for recipe in FINALISTS]
        second += [Run(FINALISTS[0], NOVEL, sizes.middling, 2 * RATE)]
        yield second
        if not all(self.is_done(run) for run in second):
            return
        base, best = self._chosen(second, (BACKPROP,)), self._chosen(second, FINALISTS)
        copied = Run(COPIED, NOVEL, sizes.middling, RATE)
        third = [Run(BEFORE, corpus) for corpus in OTHERS]
        third += [
            run._replace(corpus=corpus, seed=seed) for corpus, seed, run in product(OTHERS, SEEDS, (base, best, copied))
        ]
        yield third
        yield [run._replace(updates=sizes.long) for run in (base, best)]

    def _chosen(self, runs: Sequence[Run], names: Sequence[str]) -> Run:
        """The run of these recipes with the lowest loss on the text to choose by."""

        def loss(run: Run) -> float:
            record = json.loads((self.records / f"{run.name}.json").read_text())
            return fmean(record["nll"]["choose"])

        return min((run for run in runs if run.recipe in names), key=loss)


# ---- the text


def texts(study: Study, corpus: str) -> tuple[str, str]:
    """What is trained on, and what the held-out windows end with."""
    if corpus == "chat":
        train, held = (_plain(study.chat / f"{name}.jsonl") for name in ("train", "valid"))
        return train, held
    (path,) = study.books.glob(f"{corpus}*.txt")
    text, sizes = path.read_text(encoding="utf-8"), study.sizes
    start = text.index("\n", len(text) - HELD_CHARACTERS * sizes.window * (sizes.choose + sizes.report)) + 1
    return text[:start], text[start:]


def training_text(study: Study, corpus: str) -> Path:
    """The file that is trained on, made where it is missing."""
    path = study.out / "text" / f"{corpus}.txt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, texts(study, corpus)[0])
    return path


def _plain(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return "\n\n".join(f"{row['prompt']}\n{row['completion']}" for row in rows) + "\n"


def held_out(study: Study, corpus: str) -> dict[str, Tensor]:
    """The windows of every set, int64 [windows, T]: the last tokens are reported, those before them choose."""
    sizes, tokenizer = study.sizes, load_tokenizer(study.model)
    choose, report, old = (count * sizes.window for count in (sizes.choose, sizes.report, sizes.old))
    ids = torch.from_numpy(tokenizer.encode(texts(study, corpus)[1])).long()
    start = study.old.read_text(encoding="utf-8")[: HELD_CHARACTERS * old]
    old_ids = torch.from_numpy(tokenizer.encode(start)).long()
    assert len(ids) >= choose + report and len(old_ids) >= old, "too little text is held out"
    found = {"choose": ids[-choose - report : -report], "report": ids[-report:], "old": old_ids[:old]}
    return {name: found[name].view(-1, sizes.window) for name in SETS}


@torch.no_grad()
def evaluate(stages: Sequence[Stage], windows: Tensor) -> dict[int, list[float]]:
    """By the block of an exit the mean negative log-likelihood of the labels of every window [windows, T], nats."""
    found: dict[int, list[float]] = {stage.plan.last_block: [] for stage in stages if stage.head is not None}
    for window in windows:
        hidden_states, labels = window[None], torch.full_like(window, IGNORE_INDEX)[None]
        labels[:, :-1] = window[1:]
        for stage in stages:
            hidden_states = stage.hidden_states(hidden_states)
            if stage.head is not None:
                nlls = stage.head.token_nlls(hidden_states, labels)[:, :-1]
                found[stage.plan.last_block].append(round(nlls.double().mean().item(), 6))
    return found


# ---- one run


def configuration(study: Study, run: Run, **keys: Any) -> Config:
    """Of a run; `keys` replace what it has, a __ is a dot."""
    given = {
        "model.pretrained": study.model.absolute(),
        "data.train": training_text(study, run.corpus).absolute(),
        "data.sequence_length": study.sizes.window,
        "data.cache": (study.out / "prepared").absolute(),
        "train.steps": run.updates,
        "train.micro_batch_size": 1,
        "train.micro_batches_per_update": 1,
        "train.learning_rate": run.rate,
        "train.warmup_steps": min(5, run.updates),
        "train.seed": run.seed,
        "optimizer.weight_decay": 0.0,
        "checkpoint.every": 0,
        "run.dir": (study.out / "runs" / run.name).absolute(),
    }
    given |= study.recipes[run.recipe].keys | {key.replace("__", "."): value for key, value in keys.items()}
    return load({}, [f"--{key}={value}" for key, value in given.items()])


def execute(study: Study, run: Run) -> Record:
    """Train and evaluate; the record."""
    if run.recipe == BEFORE:
        config = configuration(study, Run(BACKPROP, run.corpus, 1, RATE))
        blueprint = make_blueprint(config, None, None)
        use_fair_share_of_cores()
        stage = make_stage(blueprint.stages[0], blueprint, seed=0, pretrained=study.model)
        return about(study, run) | losses(study, run, [stage])
    config, recipe = configuration(study, run), study.recipes[run.recipe]
    blueprint = make_blueprint(config, None, None)
    wall, processor = time.perf_counter(), time.process_time()
    if recipe.prototype is not None:
        trained = prototypes.train(config, recipe.prototype)
        seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
        found = losses(study, run, trained.stages) | held_by(trained.stages, trained.optimizers)
        muon = prototypes.muon_flops(trained.optimizers)
        found |= {"optimizer_flops": muon / study.sizes.window} if muon else {}
    else:
        with lptransformer.initialize(config, force=True) as engine:
            assert isinstance(engine, LocalUpdateEngine)
            for _ in range(run.updates):
                engine.train_batch()
            seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
            local = [one for one in engine.local.values() if isinstance(one, TrainedStage)]
            assert len(local) == len(engine.local)
            stages = [one.engine.module for one in local]
            found = losses(study, run, stages) | held_by(stages, [one.optimizer for one in local])
            found["optimizer_bytes"] += sum(
                weight.nbytes for one in local if one.versions is not None for weight in one.parameters
            )  # delayed gradients: a second version of the weights
    found["train_seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    return about(study, run) | found | costs(study, run, blueprint)


def about(study: Study, run: Run) -> Record:
    recipe = study.recipes.get(run.recipe, Recipe({}))
    return {
        "format": 1,
        **run._asdict(),
        "tokens": run.updates * study.sizes.window,
        "prototype": recipe.prototype,
        "keys": recipe.keys,
        "model": study.model.name,
        "window": study.sizes.window,
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")}
        | {"lptransformer": lptransformer.__version__},
    }


def losses(study: Study, run: Run, stages: Sequence[Stage]) -> Record:
    """`nll` of the last exit by set and window; of the exits below it the means."""
    for stage in stages:
        stage.eval()
    found = {name: evaluate(stages, windows) for name, windows in held_out(study, run.corpus).items()}
    *lower, last = found["report"]
    below = {str(block): {name: round(fmean(found[name][block]), 6) for name in SETS} for block in lower}
    return {"nll": {name: of_exits[last] for name, of_exits in found.items()}, "lower_exits": below}


def held_by(stages: Sequence[Stage], optimizers: Sequence[torch.optim.Optimizer]) -> Record:
    """What trains, and the bytes that the optimizers keep for it."""
    weights = {id(weight): weight for stage in stages for weight in stage.parameters() if weight.requires_grad}
    states = [value for one in optimizers for of in one.state.values() for value in of.values()]
    kept = sum(value.nbytes for value in states if isinstance(value, Tensor) and value.dim() > 0)
    return {"trained_weights": sum(weight.numel() for weight in weights.values()), "optimizer_bytes": kept}


# ---- what it costs


def costs(study: Study, run: Run, blueprint: Blueprint) -> Record:
    """FLOPs per token, heads counted, beside those of backprop; memory and traffic on pipeline ranks."""
    recipe, steps = study.recipes[run.recipe], run.updates
    own = prototypes.of_update(blueprint, recipe.prototype)
    base = flops.spent(objectives.build(blueprint.objective.num_blocks, BACKPROP), blueprint.costs, steps, steps)
    found = {"total": own.total, "serial": own.serial}
    found |= {"backprop_total": base.total / steps, "backprop_serial": base.serial / steps}
    sizes = [span.last - span.first + 1 for span in blueprint.objective.usual.spans]
    ranks = [on_ranks(study, run, recipe, number) for number in recipe.ranks]
    return {"chunks": sizes, "flops": found, "ranks": ranks}


def on_ranks(study: Study, run: Run, recipe: Recipe, number: int) -> Record:
    """On so many pipeline ranks: bytes of activations at the peak of a process, by rank, at one and at PIPELINED
    micro-batches of a window; bytes that cross all borders between ranks in an update of one window."""
    config = configuration(study, run, parallel__pipeline=number)
    blueprint = make_blueprint(config, None, None)
    found: Record = {"ranks": number, "activations": None}
    if recipe.prototype in (None, prototypes.MUON):  # which the package's own stages are
        if (run.recipe, number) not in study.activations:
            empty, plans = EmptyStages(blueprint, alike=True), blueprint.stages
            how = precision(blueprint.dtype, config.optimizer, zero_stage=blueprint.zero_stage)
            study.activations[run.recipe, number] = {
                str(many): [rank.activations for rank in empty.ranks(blueprint.objective, plans, how, rounds=many)]
                for many in (1, PIPELINED)
            }
        found["activations"] = study.activations[run.recipe, number]
    tokens, hidden = blueprint.sequence_length, blueprint.parts.hidden_size * DTYPES[blueprint.dtype].bytes
    pairs = zip(blueprint.stages, blueprint.stages[1:], strict=False)
    borders = [above.index for below, above in pairs if below.pipeline_rank < above.pipeline_rank]
    of_phase = [sum(len(phase.crossing(index)) for index in borders) for phase in blueprint.phases]
    down = fmean(of_phase[blueprint.objective.phase_at(update, run.updates)] for update in range(run.updates))
    found["up_bytes"] = sum(blueprint.token_bytes(index - 1) for index in borders) * tokens
    found["gradient_bytes"] = round(down * hidden * tokens)
    found["target_bytes"] = hidden * tokens if recipe.prototype == prototypes.DISTILLED else 0
    return found


# ---- all of them


def write(study: Study, run: Run) -> None:
    record = execute(study, run)
    study.records.mkdir(parents=True, exist_ok=True)
    write_text(study.records / f"{run.name}.json", finetune_report.to_json(record))


def run_all(study: Study, only: str, processes: int, flags: Sequence[str]) -> int:
    """Every run without a record whose name is like `only`, so many at a time; how many failed.

    With no processes they run in this one.
    """
    children: dict[subprocess.Popen[bytes], Run] = {}
    failed: list[str] = []

    def end(*_: Any) -> None:
        started = psutil.Process().children()  # one that has just begun is not among `children` yet
        for child in started:
            child.terminate()
        psutil.wait_procs(started)
        raise SystemExit(130)

    for signum in (signal.SIGINT, signal.SIGTERM) if processes else ():
        signal.signal(signum, end)

    def collect(most: int) -> None:
        """Wait until no more than so many are running."""
        while len(children) > most:
            time.sleep(0.5)
            for child in [one for one in children if one.poll() is not None]:
                run = children.pop(child)
                said(f"{run.name}: {'done' if child.returncode == 0 else f'failed, see {log_of(study, run)}'}")
                failed.extend([run.name] * (child.returncode != 0))

    for corpus in (NOVEL, *OTHERS):
        training_text(study, corpus)  # before two processes do it at once
    for part in study.parts():
        for run in (one for one in part if fnmatchcase(one.name, only) and not study.is_done(one)):
            if processes == 0:
                write(study, run)
                continue
            collect(processes - 1)
            log_of(study, run).parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, *flags, "--one", json.dumps(run)]
            with open(log_of(study, run), "wb") as log:
                one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
                child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=one_thread)
            children[child] = run
            said(f"{run.name}: begins")
        collect(0)  # the next part may depend on it
    return len(failed)


def said(text: str) -> None:
    print(time.strftime("%H:%M"), text, file=sys.stderr, flush=True)


def log_of(study: Study, run: Run) -> Path:
    return study.out / "logs" / f"{run.name}.log"


def tiny(out: Path) -> Study:
    """A random model on bytes, and short texts of the repository, in place of what is measured."""
    model, books, chat, old = out / "model", out / "books", out / "chat", out / "old.txt"
    if not old.is_file():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_layers": 6, "num_heads": 4, "vocab_size": 259, "intermediate_size": 48}
        config = hf_config.new_config(
            "llama", **sizes, num_key_value_heads=2, max_position_embeddings=64, end_of_text_id=1
        )
        config.tie_word_embeddings = True
        hf_config.model_class(config)(config).save_pretrained(model)
        load_tokenizer("bytes").save(model)
        for folder in (books, chat):
            folder.mkdir(exist_ok=True)
        novels = sorted((ROOT / "data/books/train").glob("*.txt"))
        for corpus, novel in zip((NOVEL, OTHERS[0]), novels, strict=False):
            write_text(books / f"{corpus}.txt", novel.read_text(encoding="utf-8")[-3000:])
        rows = [{"prompt": f"How many are {n} and {n}?", "completion": f"They are {2 * n}."} for n in range(60)]
        for name in ("train", "valid"):
            write_text(chat / f"{name}.jsonl", "\n".join(map(json.dumps, rows)))
        write_text(old, novels[2].read_text(encoding="utf-8")[:2000])
    return Study(model, books, chat, old, out, folder=out, sizes=TINY)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face model (benchmarks/pretrained.py)")
    parser.add_argument("--books", type=Path, metavar="DIR", help="the novels, a text file each")
    parser.add_argument("--chat", type=Path, metavar="DIR", help="train.jsonl and valid.jsonl of prompt and completion")
    parser.add_argument("--old", type=Path, metavar="FILE", help="text that shows what is forgotten (WikiText-2)")
    parser.add_argument("--out", type=Path, metavar="SCRATCH", help="folder for prepared text and logs")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="runs whose name is like this")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="name the runs, with a mark at those that have a record")
    parser.add_argument("--tiny", action="store_true", help="all of it on a tiny random model, into SCRATCH alone")
    parser.add_argument("--report", action="store_true", help="the page again, from the records, and nothing else")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    needed = ("out",) if args.tiny else () if args.report else ("model", "books", "chat", "old", "out")
    if missing := [name for name in needed if getattr(args, name) is None]:
        parser.error(f"give --{', --'.join(missing)}")
    if args.tiny:
        study = tiny(args.out.absolute())
    elif args.report:
        finetune_report.write(FOLDER)
        return
    else:
        study = Study(args.model, args.books, args.chat, args.old, args.out)
    if args.one:
        write(study, Run(*json.loads(args.one)))
    elif args.list:
        for number, part in enumerate(study.parts(), 1):
            for run in (one for one in part if fnmatchcase(one.name, args.only)):
                print(number, "done" if study.is_done(run) else "    ", run.name)
    else:
        flags = [
            f"--{name}={getattr(args, name)}" for name in ("model", "books", "chat", "old", "out") if not args.tiny
        ]
        failed = run_all(study, args.only, 0 if args.tiny else args.processes, flags)
        finetune_report.write(study.folder)
        sys.exit(int(failed > 0))


if __name__ == "__main__":
    main()
