"""Whether two checkouts train the same bits: losses, gradient norms and weights of the same runs with either's code.

    git worktree add ../before main~1
    python benchmarks/same_bits.py ../before . --jobs 2

Every case is a short training of a small model on a real text, made by `python -m lptransformer` in each checkout, with
this interpreter and one thread. Everything that is compared is read from files that a run leaves or from what a command
prints, and nothing of lptransformer is imported: modules may move between the two. Some cases also hand a checkpoint of
OLD to NEW, which evaluates and exports it to the same numbers and resumes it to the bits of OLD's undisturbed run.
Exit code 1 where a case differs or a command fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

# Keys that were renamed, the newest name first. Cases are written with the newest; a checkout gets the one it knows.
KEYS = {
    "border.codec": "train.border_dtype",
    "loss.chunk_tokens": "head.chunk_tokens",
    "checkpoint.every": "train.save_every",
}
QUICK_START = "configs/quickstart.yaml"
TEXT, HELD_OUT = "data/books/train/frankenstein.txt", "data/books/valid/wuthering-heights.txt"
STEPS, HALF = 4, 2
# DeepSpeed leaves tensors as small as those of the cases whole at ZeRO 3 otherwise.
PARTITIONED = "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
SMALL: dict[str, Any] = {
    "model": {"family": "llama", "hidden_size": 32, "num_layers": 4, "num_heads": 2},
    "data": {"tokenizer": "bytes", "sequence_length": 32},
    "parallel": {"timeout_seconds": 120.0},  # then a deadlock is an error
    "train": {"steps": STEPS, "micro_batch_size": 2, "micro_batches_per_update": 4, "warmup_steps": 1, "eval_every": 2},
}
# What is compared of the rows in metrics.jsonl; the others are times and memory.
OF_ROW = ("tokens", "learning_rate")
OF_STAGE = ("loss", "grad_norm", "skipped")
OF_EXIT = ("nll_per_token", "perplexity", "bits_per_byte", "word_perplexity", "tokens")

How = Literal["train", "resume", "hand over", "fine-tune"]


class Failure(Exception):
    """Why a case could not be compared."""


@dataclass(frozen=True)
class Case:
    """A run, by the flags of the command line, and what is done with it.

    train: the same in both. resume: stopped half-way and resumed, in both. hand over: trained by OLD, then evaluated,
    exported and resumed by NEW. fine-tune: both start from a model that OLD has trained and exported.
    """

    name: str
    flags: tuple[str, ...]
    how: How = "train"
    quick_start: bool = False
    torchrun: int = 1  # processes, where torchrun starts them: in two thirds of the deepspeed launcher's time


# ---- the cases


def case(*flags: str, ranks: int = 1, replicas: int = 1, zero: int | None = None, how: How = "train") -> Case:
    """A run of the small model, named by what is particular about it. `flags` are KEY=VALUE."""
    objective = next((flag for flag in flags if flag.startswith("objective.name=")), "objective.name=chunked")
    words = [objective.partition("=")[2], *(flag for flag in flags if flag not in (objective, PARTITIONED))]
    words += [f"{ranks} rank" + "s" * (ranks > 1)] + ([f"{replicas} replicas"] if replicas > 1 else [])
    words += [] if zero is None else [f"ZeRO {zero}"]
    every = [*flags, f"parallel.pipeline={ranks}", f"parallel.data={replicas}"]
    every += [] if zero is None else [f"deepspeed.zero_optimization.stage={zero}"]
    words += [] if how == "train" else [how]
    return Case(", ".join(words), tuple(every), how, torchrun=ranks * replicas if how == "train" else 1)


def all_cases() -> list[Case]:
    """Every objective on one and two ranks at ZeRO 0, and at ZeRO 2; everything else in pairs, not in all products."""
    objectives: dict[str, tuple[str, ...]] = {
        "backprop": (),
        "chunked": (),
        "greedy": (),
        "overlapping": ("objective.chunks=4", "objective.first_head=true"),
        "last": ("objective.trained_blocks=2",),
        "deep_supervision": (),
        "delayed": (),
    }
    made = [Case("quick start", ("train.steps=24",), quick_start=True)]
    for name, options in objectives.items():
        made += [case(f"objective.name={name}", *options, ranks=ranks, zero=0) for ranks in (1, 2)]
    at_zero_2 = {"backprop": (2, 1), "chunked": (1, 2), "greedy": (1, 1), "overlapping": (2, 1), "last": (1, 1)}
    at_zero_2["deep_supervision"] = (1, 1)  # delayed gradients have been at ZeRO 0 alone before
    for name, (ranks, replicas) in at_zero_2.items():
        made.append(case(f"objective.name={name}", *objectives[name], ranks=ranks, replicas=replicas, zero=2))
    shared, averaged = "head.kind=shared", ("head.blocks=1", "head.ema_decay=0.9")
    baseline = ("engine=deepspeed_pipeline", "objective.name=backprop")
    return [
        *made,
        # Hybrid: some updates, or the last ones, are global.
        case("objective.name=chunked", "objective.backprop_every=2", ranks=1, zero=0),
        case("objective.name=greedy", "objective.backprop_share=0.5", ranks=2, zero=2),
        # Heads.
        case(shared, ranks=1, zero=2),
        case(shared, "objective.name=greedy", "head.refresh_every=2", ranks=2, zero=0),
        case("head.kind=low_rank", "head.rank=8", ranks=2, zero=2),
        case("head.blocks=1", "objective.name=greedy", ranks=1, zero=0),
        case(*averaged, ranks=2, zero=0),
        case("head.token_fraction=0.25", ranks=1, zero=0),
        case(shared, "head.token_fraction=0.5", "objective.name=overlapping", "objective.chunks=4", ranks=1, zero=0),
        case("head.init=model", "loss.chunk_tokens=16", ranks=1, zero=0),
        # Rounded borders, and dtypes.
        case("border.codec=int8", ranks=1, zero=0),
        case("border.codec=int8", "objective.name=greedy", ranks=2, zero=0),
        case("border.codec=bf16", ranks=2, zero=2),
        case("train.dtype=bf16", ranks=1, zero=1),
        case("train.dtype=bf16", "deepspeed.data_types.grad_accum_dtype=fp32", ranks=1, zero=2),
        case("train.dtype=bf16", "border.codec=int8", PARTITIONED, ranks=2, zero=3),
        case("train.dtype=fp64", ranks=1, zero=0),
        # Other optimizers, families, placements and ZeRO stages.
        case("optimizer.name=sgd", "train.grad_clip=0.1", ranks=1, zero=0),
        case("model.family=gpt2", "parallel.partition=[3,1]", ranks=2, zero=0),
        case("model.family=gpt2", PARTITIONED, replicas=2, zero=3),
        case("objective.name=backprop", ranks=1, replicas=2, zero=1),
        case("objective.name=overlapping", ranks=2, replicas=2, zero=0),
        # DeepSpeed's own pipeline.
        case(*baseline, ranks=1, zero=0),
        case(*baseline, ranks=2, zero=0),
        case(*baseline, "train.dtype=bf16", ranks=2, zero=1),
        # Resumed runs.
        case(how="resume"),
        case("objective.name=delayed", how="resume"),
        case(*averaged, zero=2, how="resume"),
        case("objective.name=deep_supervision", ranks=2, how="resume"),
        # Checkpoints of OLD in NEW.
        case("border.codec=int8", "loss.chunk_tokens=16", zero=2, how="hand over"),
        case(shared, "objective.name=greedy", how="hand over"),
        case("objective.name=delayed", how="hand over"),
        case("train.dtype=bf16", how="hand over"),
        case("objective.name=overlapping", ranks=2, how="hand over"),
        case(*baseline, ranks=2, how="hand over"),
        case(how="fine-tune"),
    ]


# ---- the two checkouts


class Checkout:
    """One of the two, whose commands run in its own folder on its own code."""

    def __init__(self, folder: str, work: Path) -> None:
        self.folder, self.cache = Path(folder).resolve(), work / "prepared"
        self.cache.mkdir(parents=True)
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder)}
        where = "import importlib.util as u; print(getattr(u.find_spec('lptransformer'), 'origin', None))"
        found = self._run("-c", where).strip()
        if not found.startswith(f"{self.folder}{os.sep}"):
            raise Failure(f"{self.folder}: its lptransformer is not what is imported there, but {found}")
        values = yaml.safe_load(self.command("config", str(self.folder / QUICK_START)))
        self.keys = {f"{section}.{key}" for section, keys in values.items() if isinstance(keys, dict) for key in keys}

    def command(self, *arguments: str) -> str:
        """What `python -m lptransformer ...` prints. Raises Failure with the end of its error output."""
        return self._run("-m", "lptransformer", *arguments)

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
            own = [line for line in lines if line.startswith("lptransformer: ")]
            shown = " ".join(arguments[1:3]) + (" ..." if len(arguments) > 3 else "")
            raise Failure(f"`{shown}` in {self.folder} ends with {done.returncode}: {(own or lines)[-1]}")
        return done.stdout

    def flags(self, flags: Sequence[str]) -> list[str]:
        """KEY=VALUE as overrides, by the names that this checkout has for the keys."""
        return [f"--{self._known(flag.partition('=')[0])}={flag.partition('=')[2]}" for flag in flags]

    def _known(self, key: str) -> str:
        return key if key in self.keys else KEYS.get(key, key)

    def train(
        self, config: Path, run: Path, flags: Sequence[str], *more: str, cache: Path | None = None, torchrun: int = 1
    ) -> None:
        """`python -m lptransformer train`, or as many processes by torchrun where `torchrun` is above 1."""
        every = [*more, *self.flags([*flags, f"run.dir={run}", f"data.cache={cache or self.cache}"])]
        if torchrun == 1:
            self.command("train", str(config), *every)
            return
        launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}", "launch/train.py")
        self._run(*launcher, f"--config={config}", *every)


# ---- what is compared


def numbers(run: Path) -> dict[str, Any]:
    """Every loss, gradient norm and evaluation of a run by its place, as metrics.jsonl has it.

    The order of the lines is not compared: which stage is heard first may differ from run to run.
    """
    found: dict[str, Any] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        place = f"update {row['update']}"
        place += f", evaluation {row['evaluation']}" if "evaluation" in row else ""
        found |= {f"{place}: {key}": row[key] for key in OF_ROW if key in row}
        found |= entries(place, row.get("stages", ()), OF_STAGE) | entries(place, row.get("exits", ()), OF_EXIT)
    if not any(key.endswith(": loss") and value is not None for key, value in found.items()):
        raise Failure(f"{run} has no loss")
    return found


def entries(place: str, stages: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    return {f"{place}, stage {one['stage']}: {key}": one.get(key) for one in stages for key in keys}


def tensor_files(folder: Path) -> dict[str, Path]:
    """All safetensors below a folder by their place in it. Raises Failure where there is none."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.safetensors"))}
    if not found:
        raise Failure(f"{folder} has no weights")
    return found


def last_checkpoint(run: Path) -> Path:
    folders = sorted(folder for folder in (run / "checkpoints").glob("step-*"))
    if not folders:
        raise Failure(f"{run} has no checkpoint")
    return folders[-1]


def numbers_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first number that differs, or is on one side only. JSON keeps every bit of a number that is finite."""
    for key in dict.fromkeys((*old, *new)):
        values = [repr(values[key]) if key in values else "not there" for values in (old, new)]
        if values[0] != values[1]:
            return f"{key} is {values[0]} with OLD, {values[1]} with NEW"
    return None


def tensors_difference(old: Path, new: Path) -> str | None:
    """The first tensor below two folders that is not the same, byte for byte."""
    import torch
    from safetensors.torch import load_file

    old_files, new_files = tensor_files(old), tensor_files(new)
    for name in dict.fromkeys((*old_files, *new_files)):
        if name not in old_files or name not in new_files:
            return f"{name} is with {'NEW' if name in new_files else 'OLD'} only"
        old_tensors, new_tensors = load_file(old_files[name]), load_file(new_files[name])
        for key in dict.fromkeys((*old_tensors, *new_tensors)):
            a, b = old_tensors.get(key), new_tensors.get(key)
            if a is None or b is None:
                return f"{name}: {key} is with {'OLD' if b is None else 'NEW'} only"
            if (a.dtype, a.shape) != (b.dtype, b.shape):
                return f"{name}: {key} is {a.dtype} {[*a.shape]} with OLD, {b.dtype} {[*b.shape]} with NEW"
            if not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
                apart = (a.double() - b.double()).abs().nan_to_num(0.0)
                many = f"{int((apart > 0).sum())} of {apart.numel()} elements differ"
                return f"{name}: {key}: {many}, by up to {float(apart.max()):.1e}"
    return None


def run_difference(old: Path, new: Path) -> str | None:
    different = numbers_difference(numbers(old), numbers(new))
    return different or tensors_difference(last_checkpoint(old), last_checkpoint(new))


# ---- running a case


@dataclass(frozen=True)
class Result:
    case: Case
    difference: str | None  # or what failed
    seconds: tuple[float, float]  # in OLD, in NEW


class Clock:
    """Seconds that the commands of each side took."""

    def __init__(self) -> None:
        self.seconds = {"old": 0.0, "new": 0.0}

    @contextmanager
    def of(self, side: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[side] += time.perf_counter() - start


class Bench:
    """Both checkouts, and the files that all cases share."""

    def __init__(self, old: str, new: str, work: Path) -> None:
        self.work = work
        self.old, self.new = Checkout(old, work / "old"), Checkout(new, work / "new")
        for name, source, size in (("train", TEXT, 60_000), ("valid", HELD_OUT, 8_000)):  # bytes
            (work / f"{name}.txt").write_bytes((self.old.folder / source).read_bytes()[:size])
        data = {**SMALL["data"], "train": str(work / "train.txt"), "valid": {"held-out": str(work / "valid.txt")}}
        self.small = work / "small.yaml"
        self.small.write_text(yaml.safe_dump({**SMALL, "data": data}))

    def sides(self) -> tuple[tuple[str, Checkout], ...]:
        return ("old", self.old), ("new", self.new)

    def config(self, case: Case, checkout: Checkout) -> Path:
        return checkout.folder / QUICK_START if case.quick_start else self.small

    def flags(self, case: Case) -> tuple[str, ...]:
        # The whole novel would take longer than the training.
        short = f'data.valid={{"wuthering-heights": "{self.work / "valid.txt"}"}}'
        return (*case.flags, short) if case.quick_start else case.flags

    def prepare(self, cases: Sequence[Case]) -> None:
        """Tokens for all cases, before any two of them would make the same."""
        for kind in {one.quick_start: one for one in cases}.values():
            for _, checkout in self.sides():
                flags = [f"data.cache={checkout.cache}", *self.flags(kind)]
                checkout.command("prepare", str(self.config(kind, checkout)), *checkout.flags(flags))

    def run(self, case: Case, folder: Path) -> Result:
        """The case in both checkouts; its run folders are `folder`/old and `folder`/new."""
        clock = Clock()
        how = {"train": self._train, "resume": self._resume, "hand over": self._hand_over, "fine-tune": self._fine_tune}
        try:
            difference = how[case.how](case, folder, clock)
        except (Failure, OSError, KeyError, ValueError) as error:  # a file that is missing or not what it was
            difference = f"failed: {error if isinstance(error, Failure) else repr(error)}"
        return Result(case, difference, (clock.seconds["old"], clock.seconds["new"]))

    def _train(self, case: Case, folder: Path, clock: Clock, *more: str) -> str | None:
        for side, checkout in self.sides():
            with clock.of(side):
                flags = [*self.flags(case), *more]
                checkout.train(self.config(case, checkout), folder / side, flags, torchrun=case.torchrun)
        return run_difference(folder / "old", folder / "new")

    def _resume(self, case: Case, folder: Path, clock: Clock) -> str | None:
        for side, checkout in self.sides():
            with clock.of(side):
                for flag in (f"--until={HALF}", "--resume"):
                    checkout.train(self.config(case, checkout), folder / side, self.flags(case), flag)
        return run_difference(folder / "old", folder / "new")

    def _hand_over(self, case: Case, folder: Path, clock: Clock) -> str | None:
        whole, resumed = folder / "old", folder / "new"
        flags = [*case.flags, f"checkpoint.every={HALF}"]
        with clock.of("old"):
            self.old.train(self.small, whole, flags)
        evaluated: dict[str, dict[str, Any]] = {}
        for side, checkout in self.sides():
            with clock.of(side):
                printed = json.loads(checkout.command("evaluate", str(whole), "--json").splitlines()[-1])
                evaluated[side] = entries("evaluate", printed["exits"], OF_EXIT)
                checkout.command("export", str(whole), str(folder / f"exported-{side}"))
        different = numbers_difference(evaluated["old"], evaluated["new"])
        different = different or tensors_difference(folder / "exported-old", folder / "exported-new")
        if different:
            return different
        shutil.copytree(whole, resumed)  # a run that was killed after its first checkpoint
        shutil.rmtree(last_checkpoint(resumed))
        with clock.of("new"):  # its tokens are those that OLD has prepared
            self.new.train(self.small, resumed, flags, "--resume", cache=self.old.cache)
        return run_difference(whole, resumed)

    def _fine_tune(self, case: Case, folder: Path, clock: Clock) -> str | None:
        with clock.of("old"):
            self.old.train(self.small, folder / "before", case.flags)
            self.old.command("export", str(folder / "before"), str(folder / "exported"))
        return self._train(case, folder, clock, f"model.pretrained={folder / 'exported'}", "train.seed=1")


def results(bench: Bench, cases: Sequence[Case], jobs: int) -> Iterator[Result]:
    """As they come. What an equal case left is removed."""

    def one(number: int, case: Case) -> Result:
        folder = bench.work / f"case-{number:02d}"
        folder.mkdir()
        result = bench.run(case, folder)
        if result.difference is None:
            shutil.rmtree(folder)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one, number, case) for number, case in enumerate(cases)]
        try:
            yield from (done.result() for done in as_completed(waiting))
        finally:
            pool.shutdown(cancel_futures=True)


def main() -> None:
    about = "Train the same runs with the code of two checkouts, and compare losses and weights bit for bit."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("old", metavar="OLD", help="folder of a checkout")
    parser.add_argument("new", metavar="NEW", help="folder of another one")
    parser.add_argument("--only", metavar="PATTERN", default="", help="cases whose name has this regular expression")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cases at the same time (default: 1)")
    parser.add_argument(
        "--keep", metavar="DIR", help="a new folder for the runs; those of cases that differ stay there"
    )
    args = parser.parse_args()
    cases = [one for one in all_cases() if re.search(args.only, one.name)]
    if args.list:
        print("\n".join(one.name for one in cases))
        return
    if not cases or args.jobs < 1:
        parser.error(
            f"--jobs={args.jobs}, --only={args.only!r} ({len(cases)} cases): there must be one or more of both"
        )
    if args.keep and Path(args.keep).exists():
        parser.error(f"--keep={args.keep}: it exists; give a new folder")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="same-bits-") as scratch:
        work = Path(args.keep or scratch).resolve()
        try:
            bench = Bench(args.old, args.new, work)
            bench.prepare(cases)
        except Failure as failure:
            raise SystemExit(f"same_bits: {failure}") from None
        equal = 0
        for result in results(bench, cases, args.jobs):
            equal += result.difference is None
            old, new = result.seconds
            print(f"{result.case.name}: {result.difference or 'equal'} ({old:.0f} s, {new:.0f} s)", flush=True)
    used = os.times()
    processor = used.children_user + used.children_system  # tells more than the clock where others use the machine too
    print(f"{time.perf_counter() - begun:.0f} seconds, {processor:.0f} of processor time")
    print(f"{equal} of {len(cases)} equal")
    raise SystemExit(equal < len(cases))


if __name__ == "__main__":
    main()
