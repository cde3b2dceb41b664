"""One GPU, about ten minutes: are the losses those of the CPU, and how fast is it?

    python benchmarks/gpu_check.py --list
    python benchmarks/gpu_check.py --out runs/gpu_check                         # both parts
    python benchmarks/gpu_check.py --part losses --side reference --out runs/cpu  # the CPU's losses, on any machine
    python benchmarks/gpu_check.py --part losses --reference runs/cpu/gpu_check.json --case "chunked 2"
    python benchmarks/gpu_check.py --tiny                                       # all of it on a CPU, in a minute or two

`losses` trains small models on the CPU and on the GPU and compares every loss, within 2e-5 of it in fp32 and 5e-3 in
bf16 (gradient norms: ten times that), the command line and two processes on the one GPU among them. `speed` measures
plain Hugging Face (fp32 under autocast, as ours has fp32 masters) and local updates on the same model: tokens per
second, MFU, peak memory, and the share of the time in which the GPU computes.

What is missing here is named first (benchmarks/gpu_wheels.txt says what to carry to a machine that has torch and
transformers alone). No network is used. Every case is saved when it is done, to gpu_check.json below --out; a case that
fails, hangs or takes the process with it is noted, and the others go on; so is one that needs a GPU or a package that
is not here, which is no failure. The table is printed, and written to gpu_check.md. Exit code 1 where a case failed, 2
where something is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILE = "gpu_check.json"
TOLERANCES = {"fp32": 2e-5, "bf16": 5e-3}
NORM_FACTOR = 10  # a gradient norm may be off by this much more than a loss
IN_PROCESS, COMMAND_LINE, TWO_RANKS = "in this process", "the command line", "two ranks"
PLAIN, IN_BF16 = "chunked 2", "bf16, ZeRO 2"  # cases whose losses others have to give too
GPU, FUSED = "a GPU", "torch 2.13"
PLAIN_STEPS = {"zero_force_ds_cpu_optimizer": False}  # of an offloaded optimizer: torch's, which needs no compiler
# Needed for text that is tokenised by SentencePiece, which nothing here is.
NOT_NEEDED = {"sentencepiece", "protobuf"}
Results = dict[str, Any]
Rows = list[list[list[float]]]
"""Updates, stages, (loss, gradient norm)."""


# --------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class LossCase:
    """Sections of the configuration beside those of SMALL, and how it is run.

    `needs` is GPU or a package (of which each needs a GPU too) without which it is left out. `like` is the case whose
    losses on the CPU it has to have, where that is another one; `bound` another bound than that of its dtype.
    """

    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    how: str = IN_PROCESS
    needs: str = ""
    like: str | None = None
    bound: float | None = None

    @property
    def tolerance(self) -> float:
        return self.bound or TOLERANCES[self.sections.get("train", {}).get("dtype", "fp32")]

    def reference(self, name: str) -> str:
        """The case whose losses on the CPU are those of this one."""
        return self.like or name


def _zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


BF16 = {"dtype": "bf16"}


LOSSES: dict[str, LossCase] = {
    "backprop": LossCase({"objective": {"name": "backprop"}}),
    PLAIN: LossCase(),
    "overlapping 4": LossCase({"objective": {"name": "overlapping", "chunks": 4}}),
    "deep supervision 2": LossCase({"objective": {"name": "deep_supervision", "chunks": 2}}),
    "delayed 2": LossCase({"objective": {"name": "delayed", "chunks": 2}}),
    "shared head": LossCase({"head": {"kind": "shared"}}),
    "averaged head": LossCase({"head": {"blocks": 1, "ema_decay": 0.9}}),
    "a quarter of the tokens": LossCase({"head": {"token_fraction": 0.25}}),
    "int8 border": LossCase({"border": {"codec": "int8"}}),
    "gpt2": LossCase({"model": {"family": "gpt2"}}),
    "ZeRO 2": LossCase({"deepspeed": _zero(2)}),
    "recomputing": LossCase(
        {"objective": {"name": "overlapping", "chunks": 4}, "train": {"activation_checkpointing": "selective"}}
    ),
    "offloaded": LossCase({"deepspeed": _zero(2, offload_optimizer={"device": "cpu"}) | PLAIN_STEPS}),
    "Muon": LossCase({"optimizer": {"name": "muon"}}, bound=1e-3),
    "bf16, ZeRO 1": LossCase({"train": BF16, "deepspeed": _zero(1)}),
    IN_BF16: LossCase({"train": BF16}),
    "bf16, ZeRO 3": LossCase({"train": BF16, "deepspeed": _zero(3)}),
    "bf16, ZeRO 2, Muon": LossCase({"train": BF16, "optimizer": {"name": "muon"}}),
    "bf16, delayed 2": LossCase({"train": BF16, "objective": {"name": "delayed", "chunks": 2}}),
    "bf16, ZeRO 3, offloaded": LossCase(
        {"train": BF16, "deepspeed": _zero(3, offload_optimizer={"device": "cpu"}) | PLAIN_STEPS}
    ),
    "compiled": LossCase({"train": {"compile": True}}, needs=GPU, like=PLAIN),
    "TF32": LossCase({"train": {"tf32": True}}, needs=GPU, like=PLAIN, bound=2e-3),
    "flex attention": LossCase({"model": {"attention": "flex_attention"}}, needs=GPU, like=PLAIN),
    "bf16, flash attention": LossCase(
        {"train": BF16, "model": {"attention": "flash_attention_2"}}, needs="flash_attn", like=IN_BF16
    ),
    "torch's loss": LossCase({"loss": {"fused": "torch"}}, needs=FUSED, like=PLAIN),
    "Liger's loss": LossCase({"loss": {"fused": "liger"}}, needs="liger_kernel", like=PLAIN),
    "bf16, Liger's loss": LossCase({"train": BF16, "loss": {"fused": "liger"}}, needs="liger_kernel", like=IN_BF16),
    "AdamW in 8 bits": LossCase({"optimizer": {"name": "adamw_8bit"}}, needs="bitsandbytes", like=PLAIN, bound=2e-3),
    "command line: save, resume, evaluate": LossCase(
        {"run": {"trace": [2, 3], "profile": [3, 3]}}, how=COMMAND_LINE, like=PLAIN
    ),
    "two ranks on one GPU": LossCase(how=TWO_RANKS, like=PLAIN),
}
SMALL: dict[str, dict[str, Any]] = {
    "model": {"family": "llama", "hidden_size": 256, "num_layers": 4, "num_heads": 4},
    "data": {"tokenizer": "bytes", "sequence_length": 256},
    "train": {"steps": 12, "micro_batch_size": 4, "micro_batches_per_update": 2, "learning_rate": 1e-3},
}


@dataclass(frozen=True)
class SpeedCase:
    """Plain Hugging Face, or `sections` of the configuration beside the model's; `needs` as of LossCase.

    `heads` are the LM heads that are paid for, the last one included: a loss over a share of the tokens costs that
    share, and a readout that is not trained two of the three products.
    """

    sections: Mapping[str, Mapping[str, Any]] | None
    heads: float = 1.0
    recomputing: bool = False
    needs: str = ""


def _chunked(chunks: int, train: Mapping[str, Any] | None = None, **head: Any) -> dict[str, Any]:
    return {
        "objective": {"name": "chunked", "chunks": chunks},
        **({"head": head} if head else {}),
        **({"train": train} if train else {}),
    }


SPEED: dict[str, SpeedCase] = {
    "Hugging Face": SpeedCase(None),
    "Hugging Face, recomputing": SpeedCase(None, recomputing=True),
    "backprop": SpeedCase({"objective": {"name": "backprop"}}),
    "chunked 2": SpeedCase(_chunked(2), heads=2),
    "chunked 4": SpeedCase(_chunked(4), heads=4),
    "chunked 4, cheap heads": SpeedCase(
        _chunked(4, kind="shared", token_fraction=0.25, refresh_every=10), heads=1 + 3 * 0.25 * 2 / 3
    ),
    "chunked 2, selective recomputing": SpeedCase(_chunked(2, {"activation_checkpointing": "selective"}), heads=2),
    "chunked 2, recomputing": SpeedCase(_chunked(2, {"activation_checkpointing": "blocks"}), heads=2),
    "chunked 2, compiled": SpeedCase(_chunked(2, {"compile": True}), heads=2, needs=GPU),
    "chunked 2, Liger's loss": SpeedCase({**_chunked(2), "loss": {"fused": "liger"}}, heads=2, needs="liger_kernel"),
}


@dataclass(frozen=True)
class Size:
    """The model of the speed part: a Llama, and what an update of it takes."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    sequence_length: int
    micro_batch_size: int
    micro_batches: int
    warm_up: int
    updates: int

    @property
    def tokens(self) -> int:
        """Of an update."""
        return self.micro_batches * self.micro_batch_size * self.sequence_length

    def flops_per_token(self, heads: float) -> float:
        """Forward and backward: three times two per weight of a matrix, and causal attention's two products."""
        block = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        matrices = self.num_layers * block + heads * self.vocab_size * self.hidden_size
        return 6.0 * matrices + 6.0 * self.num_layers * self.sequence_length * self.hidden_size


LARGE = Size(2048, 16, 16, 5504, 32_000, 2048, 8, 4, warm_up=3, updates=4)  # 0.9 billion weights in matrices
TINY = Size(64, 4, 4, 128, 300, 64, 2, 2, warm_up=1, updates=2)


# ------------------------------------------------------------------------------------------ what is missing here


def missing() -> list[str]:
    """What has to be installed first, with the versions that pyproject.toml asks for, and what those need."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        todo = [(text, "lptransformer") for text in tomllib.load(file)["project"]["dependencies"]]
    found, seen = [], set()
    while todo:
        text, origin = todo.pop()
        name, least = _requirement(text)
        if name in NOT_NEEDED or (name, least) in seen:
            continue
        seen.add((name, least))
        try:
            there = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} (needed by {origin}: {text.partition(';')[0].strip()})")
            continue
        if least and _version(there) < _version(least):
            found.append(f"{name} {there} is too old for {origin}, which needs {least}")
        needs = importlib.metadata.requires(name) or []
        todo += [(need, name) for need in needs if _applies(need)] if (name, "") not in seen else []
        seen.add((name, ""))
    return sorted(found)


def _requirement(text: str) -> tuple[str, str]:
    """The name and the least version of a requirement."""
    name = re.match(r"[A-Za-z0-9._-]+", text.strip())
    least = re.search(r">=\s*([0-9.]+)", text.partition(";")[0])
    return re.sub(r"[-_.]+", "-", name.group().lower()) if name else "", least.group(1) if least else ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[0-9.]*", text).group().strip(".").split("."))  # type: ignore[union-attr]


def _applies(need: str) -> bool:
    """Whether a requirement holds here: without extras, and only where its marker is true."""
    marker = need.partition(";")[2].strip()
    if not marker:
        return True
    if "extra" in marker or importlib.util.find_spec("packaging") is None:
        return False
    from packaging.markers import Marker

    return Marker(marker).evaluate()


# ------------------------------------------------------------------------------------------------ the parent


def parser() -> argparse.ArgumentParser:
    about, _, more = __doc__.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    main = argparse.ArgumentParser(description=about, epilog=more, formatter_class=formatter, allow_abbrev=False)
    main.add_argument("--part", choices=("losses", "speed"), help="one part (default: both)")
    main.add_argument("--case", action="append", metavar="NAME", help="these cases alone (may be given several times)")
    main.add_argument("--list", action="store_true", help="name the cases")
    main.add_argument(
        "--out", default="runs/gpu_check", metavar="DIR", help="folder of the results (default: %(default)s)"
    )
    main.add_argument("--reference", metavar="FILE", help="results with the CPU's losses, made on another machine")
    text = "losses: the CPU's alone, the device's alone (default: both, the CPU's where they are not there yet)"
    main.add_argument("--side", choices=("reference", "device"), help=text)
    main.add_argument("--tiny", action="store_true", help="small sizes, and a CPU in place of the GPU")
    main.add_argument("--peak", type=float, metavar="FLOPS", help="peak of the GPU in bf16 (default: by its name)")
    text = "longest time of a case (default: %(default)s)"
    main.add_argument("--case-seconds", type=float, default=240, metavar="S", help=text)
    main.add_argument("--worker", choices=("reference", "device"), help=argparse.SUPPRESS)
    return main


def chosen(args: argparse.Namespace) -> dict[str, list[str]]:
    """The cases of every part that is named. Ends the program where a name is none."""
    parts = {"losses": list(LOSSES), "speed": list(SPEED)}
    if args.case:
        unknown = set(args.case) - set(LOSSES) - set(SPEED)
        if unknown:
            parser().error(f"no such case: {', '.join(sorted(unknown))} (--list names them)")
        parts = {part: [name for name in names if name in args.case] for part, names in parts.items()}
    part = "losses" if args.side == "reference" else args.part  # the speed of the CPU is of no interest
    return {name: cases for name, cases in parts.items() if cases and part in (None, name)}


def read(path: Path) -> Results:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, results: Results) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=1))
    unfinished.replace(path)


def run_side(part: str, side: str, names: Sequence[str], args: argparse.Namespace) -> None:
    """Run cases in a process of their own; when it dies or hangs, the case is noted and another does the rest."""
    path, left = Path(args.out) / FILE, list(names)
    on_cpu = side == "reference" or args.tiny
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of one library about another
    if on_cpu:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        if args.tiny:
            environment["OMP_NUM_THREADS"] = "1"  # so small a model gains nothing by more
    command = [sys.executable, __file__, "--worker", side, "--part", part, "--out", args.out]
    command += (["--tiny"] if args.tiny else []) + ([f"--peak={args.peak}"] if args.peak else [])
    while left:
        flags = [flag for name in left for flag in ("--case", name)]
        worker = subprocess.Popen([*command, *flags], env=environment, start_new_session=True)
        why, changed, size = "", time.monotonic(), -1
        try:
            while worker.poll() is None and not why:
                time.sleep(0.1)
                now = len(done(read(path), part, side))
                if now != size:
                    changed, size = time.monotonic(), now
                if time.monotonic() - changed > args.case_seconds:
                    why = f"took longer than {args.case_seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # its session: what it has started too
            worker.wait()
        results = read(path)
        left = [name for name in left if name not in done(results, part, side)]
        if left:
            error = why or f"the process ended with code {worker.returncode}"
            note(results, part, side, left[0], {"error": error})
            write(path, results)
            print(f"{part}, {side}: {left.pop(0)}: {error}", flush=True)


def done(results: Results, part: str, side: str) -> set[str]:
    """The cases that this program has finished, well or not."""
    return set(results.get("finished", {}).get(f"{part} {side}", []))


def note(results: Results, part: str, side: str, name: str, content: Results) -> None:
    results.setdefault(part, {}).setdefault(name, {})[side] = content
    results.setdefault("finished", {}).setdefault(f"{part} {side}", []).append(name)


def compared(name: str, results: Results, side: str = "device") -> tuple[str, bool]:
    """The result of a case of the losses as text, and whether it is right."""
    case, found = LOSSES[name], results.get("losses", {})
    here, there = (found.get(key, {}).get(which) for key, which in ((name, side), (case.reference(name), "reference")))
    if here is not None and "absent" in here:
        return f"left out: {here['absent']}", True
    for which, content in (("GPU", here), ("CPU", there)):
        if content is None or "error" in content:
            return f"{which}: {content['error'] if content else 'not run'}", False
    assert here is not None and there is not None
    loss, norm = differences(here["rows"], there["rows"])
    words = f"loss {loss:.1e}, gradient norm {norm:.1e}"
    right = loss <= case.tolerance and norm <= NORM_FACTOR * case.tolerance
    if "evaluation" in here and not here["evaluation"] <= case.tolerance:
        words, right = f"{words}, evaluation off by {here['evaluation']:.1e}", False
    return words, right


def differences(here: Rows, there: Rows) -> tuple[float, float]:
    """The largest relative differences of a loss and of a gradient norm; infinite where the shapes differ."""
    worst = [0.0, 0.0]
    if [len(update) for update in here] != [len(update) for update in there] or not here:
        return math.inf, math.inf
    for update, reference in zip(here, there, strict=True):
        for one, other in zip(update, reference, strict=True):
            for which in (0, 1):
                off = abs(one[which] - other[which]) / max(abs(other[which]), 1e-12)
                worst[which] = max(worst[which], off if math.isfinite(off) else math.inf)
    return worst[0], worst[1]


def tables(results: Results, parts: Mapping[str, Sequence[str]]) -> tuple[str, bool]:
    """The results as Markdown, and whether all is right."""
    lines = [f"{side}: {described}" for side, described in sorted(results.get("machine", {}).items())]
    good = True
    if "losses" in parts:
        lines += ["", "| losses, device against CPU | bound | largest relative differences | |", "|---|---|---|---|"]
        for name in parts["losses"]:
            words, right = compared(name, results)
            good &= right
            lines.append(f"| {name} | {LOSSES[name].tolerance:.0e} | {words} | {'ok' if right else 'FAIL'} |")
    if "speed" in parts:
        titles = ("tokens/s", "MFU", "with heads", "peak GiB", "at rest GiB", "busy")
        lines += ["", f"| speed | {' | '.join(titles)} |", f"|---{'|---' * len(titles)}|"]
        for name in parts["speed"]:
            row = results.get("speed", {}).get(name, {}).get("device", {"error": "not run"})
            good &= "error" not in row
            why = row.get("error") or (f"left out: {row['absent']}" if "absent" in row else None)
            cells = [why] if why else [_cell(row[title]) for title in titles]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines), good


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    parts = chosen(args)
    if args.worker:
        return Worker(args).run(args.part, parts[args.part])
    if args.list:
        for part, names in parts.items():
            print(f"{part}: {'; '.join(names)}")
        return 0
    lacking = missing()
    for line in lacking:
        print(f"missing: {line}")
    if lacking:
        return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the worker too
    path = Path(args.out) / FILE
    results = read(path)
    if results.get("tiny") != args.tiny:  # other cases of the same names
        results = {"tiny": args.tiny}
    results["finished"] = {}
    if args.reference:
        given = read(Path(args.reference))
        if given.get("tiny") != args.tiny:
            print(f"{args.reference}: its losses are {'not ' * args.tiny}those of --tiny: make them anew")
            return 2
        for name, sides in given.get("losses", {}).items():
            if "reference" in sides:
                results.setdefault("losses", {}).setdefault(name, {})["reference"] = sides["reference"]
    write(path, results)
    wanted: dict[str, None] = {}
    if "losses" in parts:
        wanted = dict.fromkeys(LOSSES[name].reference(name) for name in parts["losses"])
        there = {name for name, sides in results.get("losses", {}).items() if "rows" in sides.get("reference", {})}
        if args.side != "device":
            run_side("losses", "reference", [name for name in wanted if name not in there], args)
        if args.side != "reference":
            run_side("losses", "device", parts["losses"], args)
    if "speed" in parts:
        run_side("speed", "device", parts["speed"], args)
    results = read(path)
    if args.side == "reference":
        rows = results.get("losses", {})
        wrong = [name for name in wanted if "rows" not in rows.get(name, {}).get("reference", {})]
        print(f"{len(wanted) - len(wrong)} of {len(wanted)} cases have the CPU's losses, in {path}")
        return int(bool(wrong))
    text, good = tables(results, parts)
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
    return int(not good)


# ------------------------------------------------------------------------------------------------ the worker


class Worker:
    """Runs cases one after another, in one process; torch and all else that is slow is imported here alone."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.side = args, args.worker
        self.on_gpu = self.side == "device" and not args.tiny
        self.out = Path(args.out)
        self.size = TINY if args.tiny else LARGE
        self.small = {section: dict(values) for section, values in SMALL.items()}
        if args.tiny:
            self.small["model"] |= {"hidden_size": 32, "num_heads": 2}
            self.small["data"]["sequence_length"] = 32
            self.small["train"]["steps"] = 4

    def run(self, part: str, names: Sequence[str]) -> int:
        import torch

        if self.on_gpu and not torch.cuda.is_available():
            print("gpu_check: torch sees no GPU here; --tiny needs none", file=sys.stderr)
            return 2
        path = self.out / FILE
        for name in names:
            started = time.perf_counter()
            try:
                if absent := self.absent(LOSSES[name].needs if part == "losses" else SPEED[name].needs):
                    content: Results = {"absent": absent}
                else:
                    content = self.losses(name) if part == "losses" else self.speed(SPEED[name])
            except Exception as error:  # whatever it is, the other cases go on
                lines = str(error).strip().splitlines() or [""]
                content = {"error": f"{type(error).__name__}: {lines[0]}"[:400]}
            content["seconds"] = round(time.perf_counter() - started, 2)
            gc.collect()
            if self.on_gpu:
                torch.cuda.empty_cache()
            results = read(path)
            results.setdefault("machine", {})[self.side] = self.machine()
            note(results, part, self.side, name, content)
            write(path, results)
            said = content.get("error") or content.get("absent") or "ran"
            if "tokens/s" in content:
                said = f"{content['tokens/s']:,.0f} tokens/s"
            print(f"{part}, {self.side}: {name}: {said} ({content['seconds']} s)", flush=True)
        return 0

    def absent(self, needs: str) -> str:
        """What of that is not here; empty for nothing."""
        if needs == FUSED:
            from lptransformer.models.cross_entropy import missing as lacking

            return lacking("torch")
        if needs and not self.on_gpu:
            return "there is no GPU"
        if needs not in ("", GPU) and importlib.util.find_spec(needs) is None:
            return f"{needs} is not installed"
        return ""

    def machine(self) -> str:
        import deepspeed
        import torch
        import transformers

        libraries = {"torch": torch, "transformers": transformers, "deepspeed": deepspeed}
        versions = ", ".join(f"{name} {library.__version__}" for name, library in libraries.items())
        where = f"CPU, {torch.get_num_threads()} thread(s)"
        if self.on_gpu:
            memory = torch.cuda.get_device_properties(0).total_memory / 2**30
            where = f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, CUDA {torch.version.cuda}"
        return f"{where}; {versions}, Python {sys.version.split()[0]}"

    # -------------------------------------------------------------------------------------------- losses

    def config(self, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The configuration of a small run, over a text that can be learnt in a few updates."""
        text = self.out / "data" / "learnable.txt"
        if not text.exists():
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text(learnable_text(60_000))
        config: dict[str, Any] = {section: dict(values) for section, values in self.small.items()}
        config["data"] |= {"train": str(text), "valid": str(text), "cache": str(text.parent)}
        for section, values in sections.items():
            config[section] = {**config.get(section, {}), **values}
        return config

    def losses(self, name: str) -> Results:
        case = LOSSES[name]
        config = self.config(case.sections)
        if case.how == IN_PROCESS:
            return {"rows": self.trained(config)}
        run = self.out / "runs" / re.sub(r"\W+", "-", name)
        config["run"] = {**config.get("run", {}), "dir": str(run)}
        if case.how == TWO_RANKS:
            config["parallel"] = {"pipeline": 2}
        file = run.with_suffix(".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(config))  # which is YAML too
        if case.how == TWO_RANKS:
            self.command("train", str(file), "--overwrite")
            return {"rows": rows_of(run)}
        half = config["train"]["steps"] // 2
        self.command("train", str(file), "--overwrite", f"--until={half}")
        self.command("train", str(file), "--resume")
        said = json.loads(self.command("evaluate", str(run), "--json"))
        if not (run / "trace.jsonl").read_text() or not list((run / "profile").iterdir()):
            raise RuntimeError(f"{run} has no trace, or no profile")
        last = said["exits"][-1]["nll_per_token"]
        trained = [r for r in metrics_of(run) if "evaluation" in r][-1]["exits"][-1]
        return {"rows": rows_of(run), "evaluation": abs(last - trained["nll_per_token"]) / last}

    def trained(self, config: dict[str, Any]) -> Rows:
        import lptransformer

        engine = lptransformer.initialize(config)
        rows = []
        for _ in range(config["train"]["steps"]):
            reports: Any = engine.train_batch().reports  # one of every stage, in their order
            rows.append([[r.loss_sum / r.label_tokens, r.grad_norm] for r in reports if r.loss_sum is not None])
        engine.close()
        return rows

    def command(self, *arguments: str) -> str:
        """A command of the project's, as a user would give it; raises RuntimeError with the end of its output."""
        environment = dict(os.environ)
        if self.on_gpu:
            environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
        command = [sys.executable, "-m", "lptransformer", *arguments]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        if ran.returncode != 0:
            lines = (ran.stderr.strip() or ran.stdout.strip()).splitlines()
            raise RuntimeError(f"{arguments[0]} ended with {ran.returncode}: {' / '.join(lines[-3:])}")
        return ran.stdout

    # -------------------------------------------------------------------------------------------- speed

    def speed(self, case: SpeedCase) -> Results:
        if case.sections is None:
            return self.timed(self.plain(case.recomputing), case.heads)
        import lptransformer

        engine = lptransformer.initialize(self.large_config(case.sections))
        try:
            return self.timed(engine.train_batch, case.heads)
        finally:
            engine.close()

    def plain(self, recomputing: bool) -> Callable[[], object]:
        """The loop that one would write by hand, over the library's own model: weights, gradients and moments in fp32,
        products in bf16, as the library's trainer does it."""
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        size, device = self.size, torch.device("cuda" if self.on_gpu else "cpu")
        config = LlamaConfig(
            vocab_size=size.vocab_size,
            hidden_size=size.hidden_size,
            num_hidden_layers=size.num_layers,
            num_attention_heads=size.num_heads,
            num_key_value_heads=size.num_heads,
            intermediate_size=size.intermediate_size,
            max_position_embeddings=size.sequence_length,
            use_cache=False,
        )
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        if recomputing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=self.on_gpu)
        shape = (size.micro_batch_size, size.sequence_length)

        def update() -> None:
            for _ in range(size.micro_batches):
                ids = torch.randint(0, size.vocab_size, shape).to(device)
                with torch.autocast(device.type, torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids).loss
                (loss / size.micro_batches).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return update

    def large_config(self, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        size, folder = self.size, self.out / "data"
        model = {"family": "llama", "num_layers": size.num_layers, "num_heads": size.num_heads}
        model |= {"hidden_size": size.hidden_size, "intermediate_size": size.intermediate_size}
        text, tokenizer = folder / f"words-{size.vocab_size}.txt", folder / f"words-{size.vocab_size}"
        if not text.exists():
            folder.mkdir(parents=True, exist_ok=True)
            make_word_tokenizer(tokenizer, size.vocab_size)
            draw = random.Random(0)
            text.write_text(" ".join(f"w{draw.randrange(1, size.vocab_size)}" for _ in range(2 * size.tokens)))
        data = {"train": str(text), "tokenizer": str(tokenizer), "sequence_length": size.sequence_length}
        train = {"micro_batch_size": size.micro_batch_size, "micro_batches_per_update": size.micro_batches, **BF16}
        return {
            **sections,
            "model": model,
            "data": {**data, "cache": str(folder)},
            "train": {"steps": 100, "learning_rate": 1e-4, **train, **sections.get("train", {})},
        }

    def timed(self, update: Callable[[], object], heads: float) -> Results:
        import torch

        size, wait = self.size, torch.cuda.synchronize if self.on_gpu else lambda: None
        for _ in range(size.warm_up):
            update()
        wait()
        at_rest = torch.cuda.memory_allocated() if self.on_gpu else None
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for _ in range(size.updates):
            update()
        wait()
        seconds = (time.perf_counter() - started) / size.updates
        peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of the process so far
        if self.on_gpu:
            peak_memory = torch.cuda.max_memory_allocated()
        tokens_per_second, peak = size.tokens / seconds, self.args.peak or self.peak()
        return {
            "tokens/s": round(tokens_per_second, 1),
            "MFU": tokens_per_second * size.flops_per_token(1) / peak if peak else None,
            "with heads": tokens_per_second * size.flops_per_token(heads) / peak if peak else None,
            "peak GiB": peak_memory / 2**30,
            "at rest GiB": None if at_rest is None else at_rest / 2**30,
            "busy": self.busy(update, wait),
        }

    def peak(self) -> float | None:
        """FLOP/s of the GPU in bf16, where the project's devices.yaml has it."""
        import torch

        if not self.on_gpu:
            return None
        from lptransformer.planning.devices import load_devices

        listed = load_devices().called(torch.cuda.get_device_name(0))
        return listed.flops["bf16"] if listed else None

    def busy(self, update: Callable[[], object], wait: Callable[[], object]) -> float:
        """The share of an update in which the GPU computes (on a CPU: in which it is in an operation of torch's)."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        activity, kind = ProfilerActivity.CPU, DeviceType.CPU
        if self.on_gpu:
            activity, kind = ProfilerActivity.CUDA, DeviceType.CUDA
        wait()
        with profile(activities=[activity]) as profiled:
            started = time.perf_counter()
            update()
            wait()
            wall = time.perf_counter() - started
        events = [e for e in profiled.events() if e.device_type == kind and not getattr(e, "is_user_annotation", False)]
        spans = [(e.time_range.start, e.time_range.end) for e in events if not e.name.startswith(("Memcpy", "Memset"))]
        return covered(spans) / 1e6 / wall


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How long at least one of the spans (start, end) lasts: kernels of several streams overlap."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rows_of(run: Path) -> Rows:
    """Losses and gradient norms of a run folder."""
    updates = [row for row in metrics_of(run) if "stages" in row]
    return [[[s["loss"], s["grad_norm"]] for s in row["stages"] if s["loss"] is not None] for row in updates]


def learnable_text(length: int) -> str:
    """Letters of which nine in ten follow from the one before, the same text everywhere."""
    draw, letters = random.Random(0), [0]
    for _ in range(length - 1):
        letters.append(draw.randrange(26) if draw.random() < 0.1 else (3 * letters[-1] + 7) % 26)
    return "".join(chr(ord("a") + letter) for letter in letters)


def make_word_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer folder in which every word w1, w2, ... is one id: a vocabulary of any size without a download."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(str(folder))


if __name__ == "__main__":
    raise SystemExit(main())
