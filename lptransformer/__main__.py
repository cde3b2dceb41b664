"""The command line: `python -m lptransformer COMMAND ...`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from glob import glob
from pathlib import Path

from lptransformer import __version__, hub
from lptransformer.config.load import starter, to_yaml
from lptransformer.errors import LostProcessError, TrainingError, UserError
from lptransformer.run_folder import history, layout, lock
from lptransformer.training.launcher import (
    add_training_flags,
    end_written,
    exit_code,
    launch,
    read_config,
    run,
)

# Flags of `report` that are about several runs.
COMPARISON = ("baseline", "deep", "shallow", "choose", "markdown", "name")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="lptransformer", description="Train language models with local updates.")
    main.add_argument("--version", action="version", version=__version__)
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command("train", train, "Train on this machine; starts the deepspeed launcher when there are more processes.")
    sub.add_argument("config", nargs="?", help="YAML file of the run (configs/); may be missing where keys say all")
    add_training_flags(sub)
    sub.add_argument("--dry-run", action="store_true", help="check, print stages, memory and FLOPs, start nothing")
    text = "hosts, a line each: name slots=N (processes); starts all of them from here, through pdsh and ssh"
    sub.add_argument("--hostfile", metavar="FILE", help=text)

    text = "Check this machine, or every host of a run: a table with what to do about each red row."
    sub = command("doctor", doctor, text)
    sub.add_argument("config", nargs="?", help="YAML file of the run that is to start (default: what any run needs)")
    sub.add_argument("--hostfile", metavar="FILE", help="hosts, a line each: name slots=N; asks all of them by ssh")

    sub = command("prepare", prepare, "Turn text, conversations or completions into a tokenizer and token sets.")
    sub.add_argument("config", nargs="?", help="YAML file whose section `data` says what to prepare")

    sub = command("config", show_config, "Print every resolved value of a configuration.")
    sub.add_argument("config", nargs="?", help="YAML file of the run")

    sub = command("init", init, "Print a first configuration: `lptransformer init > run.yaml`.")
    sub.add_argument("--pretrained", metavar="MODEL", help="start from this Hugging Face model: folder or OWNER/NAME")
    text = "training text: a file or a glob; may be given several times"
    sub.add_argument("--data", action="append", default=[], metavar="FILES", help=text)
    sub.add_argument("--valid", action="append", default=[], metavar="FILES", help="text to measure perplexity on")

    text = "What a run would take on given machines, before anything is started, and which method to use there."
    sub = command("plan", plan, text)
    sub.add_argument("config", nargs="?", help="YAML file of the run")
    sub.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default: 1)")
    text = "processes per machine (default: those of the configuration)"
    sub.add_argument("--gpus-per-node", type=int, metavar="N", help=text)
    text = "device in devices.yaml, for example h100 (default: laptop-core, one core of a CPU)"
    sub.add_argument("--gpu", default="laptop-core", metavar="NAME", help=text)
    sub.add_argument("--link", metavar="NAME", help="link between machines in devices.yaml, for example 100gbit")
    sub.add_argument("--vocab-size", type=int, metavar="N", help="entries of the vocabulary (default: the tokenizer's)")
    sub.add_argument("--json", metavar="FILE", help="write the whole plan as JSON")

    sub = command("checkpoints", checkpoints, "The checkpoints of a run, with what keeps each of them.")
    sub.add_argument("run_folder", metavar="RUN", help="run folder")
    sub.add_argument(
        "--verify", action="store_true", help="compare every file with its sum; exit code 2 if one differs"
    )
    text = "remove what checkpoint.keep_last, keep_every and keep_best (of the run, or typed here) do not keep"
    sub.add_argument("--prune", action="store_true", help=text)

    sub = command("evaluate", evaluate, "Perplexity of the exits of a run or of a Hugging Face model.")
    sub.add_argument("run_folder", metavar="MODEL", help="run folder, or Hugging Face causal LM: folder or OWNER/NAME")
    sub.add_argument(
        "--data",
        action="append",
        metavar="FILES",
        help="a glob of files as data.train takes them, hub:OWNER/NAME, or a prepared set",
    )
    sub.add_argument("--step", type=int, help="checkpoint to evaluate (default: the newest complete one)")
    sub.add_argument("--batch-size", type=int, default=8, help="windows at once (default: 8)")
    sub.add_argument("--processes", type=int, default=1, help="processes that share the windows (default: 1)")
    text = "convention: blocks (default), hf-sliding, lm-eval-wikitext (docs/runs.md)"
    sub.add_argument("--protocol", default="blocks", metavar="NAME", help=text)
    text = "tokens of a window (default: as the run was trained, else the model's length)"
    sub.add_argument("--window", type=int, metavar="N", help=text)
    sub.add_argument("--stride", type=int, metavar="N", help="hf-sliding: tokens from window to window (default: half)")
    text = "blocks: the begin-of-text token before each document (auto: as the tokenizer does; as a run was trained)"
    sub.add_argument("--bos", choices=("auto", "always", "never"), default="auto", help=text)
    text = "the exit after block K alone, counted from 0; of a model folder its norm and readout there (logit lens)"
    sub.add_argument("--exit", type=int, metavar="K", help=text)
    text = (
        "run, folder or OWNER/NAME: its last exit on the same text, the difference in bits per byte, with an interval"
    )
    sub.add_argument("--compare", metavar="BASE", help=text)
    sub.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and activations")
    add_by_stage(sub)
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    text = "Text from an exit of a run or of a Hugging Face model folder, as it comes; an earlier exit can draft."
    sub = command("generate", generate, text)
    sub.add_argument("run_folder", metavar="MODEL", help="run folder, or Hugging Face causal LM: folder or OWNER/NAME")
    sub.add_argument("--prompt", metavar="TEXT", help="text to go on from (-: standard input)")
    text = "reply by the tokenizer's chat template: to --prompt, else to every line of standard input in turn"
    sub.add_argument("--chat", action="store_true", help=text)
    sub.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of an answer, at most (default: 128)")
    sub.add_argument("--step", type=int, help="checkpoint to generate from (default: the newest complete one)")
    text = "from the exit after block K, as `evaluate` counts; of a folder without one: logit lens (default: the last)"
    sub.add_argument("--exit", type=int, metavar="K", help=text)
    sub.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of weights and activations")
    sub.add_argument("--json", action="store_true", help="print a JSON object for each answer, when it is complete")
    drawn = sub.add_argument_group("sampling (default: the likeliest token each time)")
    drawn.add_argument("--temperature", type=float, metavar="T", help="what logits are divided by (default: 1)")
    drawn.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest with this share together")
    drawn.add_argument("--top-k", type=int, metavar="N", help="draw among the N likeliest tokens")
    drawn.add_argument("--seed", type=int, metavar="N", help="of the draws (default: another one each time, told)")
    drafting = sub.add_argument_group("self-speculative decoding")
    text = "the exit after block K drafts tokens, which the model then verifies together"
    drafting.add_argument("--draft", type=int, metavar="K", help=text)
    text = "tokens that are drafted for a pass of the model (default: 4)"
    drafting.add_argument("--draft-tokens", type=int, metavar="N", help=text)

    text = "Train a grid of runs, a few at a time; started again, it continues where it stopped."
    sub = command("sweep", sweep, text)
    sub.add_argument("sweep_file", metavar="SWEEP", help="YAML file of the sweep (configs/sweeps/)")
    sub.add_argument("--processes", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    sub.add_argument("--dry-run", action="store_true", help="list the runs and their status, train nothing")

    sub = command("report", report, "Results of runs: tables and plots, of one run or compared.")
    text = "run folder, or for a comparison several, folders of sweeps, files of records"
    sub.add_argument("runs", metavar="RUN", nargs="+", help=text)
    sub.add_argument("--baselines", action="store_true", help="one run: add n-gram models of the training text")
    sub.add_argument("--trace", action="store_true", help="one run: the schedule as executed, if run.trace was set")
    sub.add_argument("--out", metavar="DIR", help="folder for plots (default: report; with --trace: the run folder)")
    sub.add_argument("--svg", action="store_true", help="pictures as SVG too, beside the PNG")
    compared = sub.add_argument_group("comparison of several runs")
    compared.add_argument("--baseline", metavar="METHOD", help="differences are to this one (default: backprop)")
    compared.add_argument("--deep", metavar="METHOD", help="with --shallow: share of the depth gain that is kept")
    compared.add_argument("--shallow", metavar="METHOD", help="backprop with fewer blocks")
    compared.add_argument("--choose", metavar="SET", help="validation set that decides on settings (default: sweep's)")
    compared.add_argument("--markdown", metavar="FILE", help="document whose tables are rewritten, or a new one")
    compared.add_argument("--name", help="begins the names of the tables in the document: NAME/TABLE")

    text = "Local against true gradients, rank of hidden states, agreement of exits: tables and a plot."
    sub = command("diagnose", diagnose, text)
    sub.add_argument("run_folder", metavar="RUN", help="run folder")
    sub.add_argument("--step", type=int, help="checkpoint to diagnose (default: the newest complete one)")
    sub.add_argument("--batches", type=int, default=8, help="batches of windows (default: 8)")
    sub.add_argument("--batch-size", type=int, default=8, help="windows at once (default: 8)")
    sub.add_argument("--set", metavar="NAME", help="validation set of the run (default: its first one)")
    text = "the model up to the exit after block K, as `evaluate` counts; the true gradient is that of its loss"
    sub.add_argument("--exit", type=int, metavar="K", help=text)
    add_by_stage(sub)

    sub = command("export", export, "Write a Hugging Face model folder from a run.")
    sub.add_argument("run_folder", metavar="RUN", help="run folder")
    sub.add_argument("out", metavar="OUT", help="folder to write; it must be empty or not exist")
    sub.add_argument("--step", type=int, help="checkpoint to export (default: the newest complete one)")
    text = "weights in the files (default: those of the model folder that the run started from, else fp32)"
    sub.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help=text)
    text = "embedding and readout as one matrix: auto, where they are equal and were one before; keep; separate"
    sub.add_argument("--tie", choices=("auto", "keep", "separate"), default="auto", help=text)
    text = "the model up to the exit after block K, as `evaluate` counts (default: the last one)"
    sub.add_argument("--exit", type=int, metavar="K", help=text)
    sub.add_argument("--keep-exits", action="store_true", help="write the auxiliary heads beside it: exits.safetensors")
    sub.add_argument("--adapter", action="store_true", help="of a run with lora.rank: its adapters alone, as peft does")
    return main


def add_by_stage(sub: argparse.ArgumentParser) -> None:
    text = "hold one group of blocks in memory at a time (auto: where the whole model does not fit); the same numbers"
    sub.add_argument("--by-stage", choices=("auto", "always", "never"), default="auto", help=text)


def train(args: argparse.Namespace) -> None:
    config = read_config(args)
    assert config.run.dir is not None
    folder = Path(config.run.dir)
    if not args.dry_run:
        lock.check_free(folder)
    if args.resume:  # before anything is counted in what a hub gives
        hub.keep_to(history.hub_commits(folder))
    if args.resume and (config.train.micro_batch_size == "auto" or config.train.epochs is not None):
        from lptransformer.training.memory import as_resumed

        config = as_resumed(config)
    auto = config.train.micro_batch_size == "auto"
    # Everything that one process can check and prepare is done before others are started.
    layout.check(folder, config, args.resume, args.overwrite, args.step)
    layout.check_until(config, args.until, args.resume, args.step)
    import torch

    from lptransformer.data.prepare import prepare_all

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed chooses anyway, with a warning
    from lptransformer.models.blueprint import embedded
    from lptransformer.planning.dry_run import dry_run, unprepared
    from lptransformer.training.memory import for_this_host, of_prepared, with_size
    from lptransformer.training.this_host import check_host

    here = args.hostfile is None  # else every host is asked when the run starts
    check_host(config, config.parallel.pipeline * config.parallel.data if here else None)
    if args.dry_run:
        if auto:
            config = for_this_host(config, unprepared(with_size(config, 1))) if here else with_size(config, 1)
        if not here:
            from lptransformer.training.hosts import placement, read_hostfile

            lines = placement(read_hostfile(args.hostfile), config.parallel.pipeline, config.parallel.data)
            print("\n".join(f"placement: {line}" for line in lines))
        dry_run(config)
        return
    if here and not auto:
        for_this_host(config, unprepared(config), force=args.force)
    if config.model.pretrained is not None:
        hub.folder(config.model.pretrained, config.at("model.pretrained"), weights=True)
    prepared = prepare_all(**config.data.model_dump(), embedded=embedded(config))
    if args.resume:
        layout.check_data(folder, prepared.folders())
    if here and auto:
        config = for_this_host(config, *of_prepared(config, prepared))
    processes, before = config.parallel.pipeline * config.parallel.data, end_written(folder)
    if processes > 1 or not here:
        flags = [flag for flag in ("--resume", "--overwrite", "--force") if getattr(args, flag[2:])]
        flags += [f"--{name}={value}" for name in ("until", "step") if (value := getattr(args, name)) is not None]
        if here and auto:
            args.overrides.append(f"--train.micro_batch_size={config.train.micro_batch_size}")
        arguments = [*([args.config] if args.config else []), *flags, *args.overrides]
        from lptransformer.training.hosts import launch_on_hosts

        code = launch(arguments, processes) if here else launch_on_hosts(config, args.hostfile, arguments)
        code = exit_code(folder, before, code)
        if code in (TrainingError.exit_code, LostProcessError.exit_code):
            say_how_to_go_on(folder)
        raise SystemExit(code)
    from lptransformer.training.train import train as train_here

    try:
        train_here(config, args.resume, args.overwrite, args.until, args.force, args.step)
    except TrainingError:
        say_how_to_go_on(folder)
        raise
    if code := exit_code(folder, before):
        raise SystemExit(code)


def say_how_to_go_on(folder: Path) -> None:
    """After a run that failed or lost a process."""
    from lptransformer.run_folder import checkpoint

    if updates := checkpoint.complete_updates(folder):
        print(f"saved after update {updates[-1]}; next: `{history.command_to_resume()}`", file=sys.stderr, flush=True)


def doctor(args: argparse.Namespace) -> None:
    config = read_config(args) if args.config or args.overrides else None
    from lptransformer.training.doctor import examine, print_rows

    red = print_rows(examine(config, args.hostfile))
    if red:
        raise SystemExit(1)


def prepare(args: argparse.Namespace) -> None:
    config = read_config(args)
    from lptransformer.console import print_table
    from lptransformer.data.prepare import prepare_all

    prepared = prepare_all(**config.data.model_dump())
    sets = [(f"train: {one.name}", one.tokens) for one in prepared.train]
    sets += [(f"valid: {name}", tokens) for name, tokens in prepared.valid.items()]
    columns = ("set", "tokens", "windows", "bytes", "words", "folder")
    rows = [
        (name, s.manifest["tokens"], len(s), s.manifest["bytes"], s.manifest["words"], str(s.folder))
        for name, s in sets
    ]
    print_table(f"tokenizer: {prepared.tokenizer.vocab_size} ids, {prepared.tokenizer_folder}", columns, rows)


def show_config(args: argparse.Namespace) -> None:
    print(to_yaml(read_config(args)), end="")


def init(args: argparse.Namespace) -> None:
    no_overrides(args)
    for pattern in (*args.data, *args.valid):
        if not pattern.startswith("hub:") and not glob(pattern, recursive=True):
            print(f"lptransformer: no file matches {pattern} here yet", file=sys.stderr)
    text = starter(args.pretrained, args.data, args.valid)
    print("# Train: `lptransformer train FILE`. Check first: `--dry-run`. Every key: `lptransformer config FILE`.")
    print(text, end="")


def plan(args: argparse.Namespace) -> None:
    config = read_config(args)
    from lptransformer import files
    from lptransformer.planning import plan as planning

    target = None if args.json is None else Path(args.json)
    if target is not None:
        files.check_output(target, "--json")
    made = planning.make(
        config,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        gpu=args.gpu,
        link=args.link,
        vocab_size=args.vocab_size,
    )
    from lptransformer.planning.plan_report import print_plan, to_json

    print_plan(made)
    if target is not None:
        files.write_output(target, to_json(made), "--json")


def evaluate(args: argparse.Namespace) -> None:
    no_overrides(args)
    from lptransformer.evaluation.perplexity import evaluate_run, print_evaluations, to_json

    options = ("step", "protocol", "window", "stride", "bos", "dtype", "batch_size", "processes", "by_stage")
    chosen = {name: getattr(args, name) for name in options}
    chosen |= {"exit_block": args.exit, "compare": args.compare}
    results = evaluate_run(args.run_folder, args.data, **chosen)
    if results is not None:  # of several processes, the first one has them
        print(to_json(results)) if args.json else print_evaluations(results)


def generate(args: argparse.Namespace) -> None:
    no_overrides(args)
    from lptransformer.evaluation.generate import generate_run

    names = ("chat", "max_tokens", "step", "dtype", "temperature", "top_p", "top_k", "seed", "draft_tokens")
    chosen = {name: getattr(args, name) for name in names}
    blocks = {"exit_block": args.exit, "draft_block": args.draft}
    generate_run(Path(args.run_folder), args.prompt, as_json=args.json, **blocks, **chosen)


def sweep(args: argparse.Namespace) -> None:
    if args.processes < 1:
        raise UserError(f"--processes={args.processes}: give a whole number, 1 or more")
    from lptransformer.study import sweep_file

    checked = sweep_file.read(args.sweep_file, args.overrides)  # before anything slow is imported
    if run := next((run for run in checked.runs if run.config.train.micro_batch_size == "auto"), None):
        raise UserError(
            f"{args.sweep_file}: run {run.name}: train.micro_batch_size is auto: runs with batches of different size "
            "cannot be compared, and those that train at once share the memory; give a number"
        )
    from lptransformer.study.sweep import run_sweep

    if any(run.config.train.epochs is not None for run in checked.runs):  # which takes their text
        from lptransformer.training.memory import counted

        checked = replace(checked, runs=tuple(replace(run, config=counted(run.config)) for run in checked.runs))
    run_sweep(checked, args.processes, args.dry_run)


def report(args: argparse.Namespace) -> None:
    no_overrides(args)
    from lptransformer.study.report import compare
    from lptransformer.study.report import report as report_run
    from lptransformer.study.result_tables import Question
    from lptransformer.study.trace_report import report_trace

    paths = [Path(run) for run in args.runs]
    compared = [f"--{name}" for name in COMPARISON if getattr(args, name) is not None]
    if args.trace:
        others = [f"{len(paths)} folders"] * (len(paths) > 1) + ["--baselines"] * args.baselines + compared
        if others:
            raise UserError(f"--trace with {', '.join(others)}: it is a report of its own, about one run")
        report_trace(paths[0], Path(args.out) if args.out else paths[0], args.svg)
        return
    if len(paths) == 1 and (layout.holds_run(paths[0]) or not paths[0].exists()):
        others = compared + ["--out"] * (args.out is not None)
        if others and paths[0].exists():
            raise UserError(
                f"{paths[0]} with {', '.join(others)}: that is for comparisons (several runs, folders of sweeps, files "
                "of records); the report of one run is written into its folder"
            )
        report_run(paths[0], args.baselines, args.svg)
        return
    if args.baselines:
        raise UserError("--baselines is for the report of one run: name one run folder, or leave it out")
    if (args.deep is None) != (args.shallow is None):
        raise UserError("--deep and --shallow belong together: give both methods, or neither")
    if args.name is not None and args.markdown is None:
        raise UserError(f"--name={args.name} belongs to --markdown: give both, or neither")
    question = Question(args.baseline, args.deep, args.shallow, args.choose)
    document = None if args.markdown is None else Path(args.markdown)
    compare(paths, Path(args.out or "report"), question, document, args.name or "", args.svg)


def checkpoints(args: argparse.Namespace) -> None:
    from lptransformer.console import megabytes, print_table
    from lptransformer.run_folder import checkpoint, lock, retention
    from lptransformer.run_folder.metrics_log import readable

    run = Path(args.run_folder)
    options = retention.options(run, args.overrides)
    losses = retention.losses_of(readable(run)[0], options.keep_best)
    damaged = retention.damaged(run) if args.verify or args.prune else {}
    if args.prune:
        if damaged:  # what is kept could be what cannot be read
            raise UserError(
                f"nothing is removed: {'; '.join(damaged.values())}; remove that checkpoint, or resume first"
            )
        with lock.begin(run).file:
            gone = retention.prune(run, options, losses)
            checkpoint.remove_unfinished(run)
        print(f"removed {len(gone)} checkpoints" + (f": {', '.join(map(str, gone))}" if gone else ""))
    entries = retention.listed(run, options, losses)
    older = "no sums (an older format)"
    verified = [
        damaged.get(entry.update, "good" if checkpoint.has_sums(run, entry.update) else older) for entry in entries
    ]
    table = [
        (
            *(entry.update, megabytes(entry.num_bytes)),
            "-" if entry.lost_seconds is None else f"{entry.lost_seconds:.2f}",
            *(", ".join(entry.why) or "nothing", *([state] if args.verify else [])),
        )
        for entry, state in zip(entries, verified, strict=True)
    ]
    columns = ("updates", "size", "seconds lost", "kept as", *(["files"] if args.verify else []))
    print_table(f"{len(entries)} checkpoints in {run}", columns, table)
    for what in damaged.values():
        raise UserError(what)


def diagnose(args: argparse.Namespace) -> None:
    no_overrides(args)
    from lptransformer.evaluation.diagnosis import diagnose_run, print_diagnosis, write_diagnosis

    run = Path(args.run_folder)
    options = {name: getattr(args, name) for name in ("step", "batches", "batch_size", "by_stage")}
    results = diagnose_run(run, set_name=args.set, exit_block=args.exit, **options)
    print_diagnosis(results)
    print(f"numbers: {write_diagnosis(run, results)}   plot: {run / 'diagnosis.png'}")


def export(args: argparse.Namespace) -> None:
    no_overrides(args)
    from lptransformer.evaluation.export import export_adapter, export_run

    options = {"tie": args.tie, "dtype": args.dtype, "exit_block": args.exit, "keep_exits": args.keep_exits}
    if args.adapter and options != {"tie": "auto", "dtype": None, "exit_block": None, "keep_exits": False}:
        raise UserError("--adapter writes adapters alone, as they were trained: --tie, --dtype and exits go without it")
    run, out = Path(args.run_folder), Path(args.out)
    exported = export_adapter(run, out, args.step) if args.adapter else export_run(run, out, args.step, **options)
    what = "adapters" if args.adapter else "model"
    print(f"{args.out}: the {what} of {args.run_folder} after {exported.update} updates")
    for note in exported.notes:
        print(note)


def no_overrides(args: argparse.Namespace) -> None:
    if args.overrides:
        word = args.overrides[0]
        change = {word: f"--data={word}"} if args.command == "evaluate" and not word.startswith("-") else None
        raise UserError(f"{word!r} on the command line: `{args.command}` takes no such argument", change=change)


def main() -> None:
    run(parser())


if __name__ == "__main__":
    main()
