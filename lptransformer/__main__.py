"""The command line: `python -m lptransformer COMMAND ...`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from lptransformer import __version__, run_folder
from lptransformer import config as configuration
from lptransformer.errors import UserError
from lptransformer.launcher import add_training_flags, launch, run


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="lptransformer", description="Train language models with local updates.")
    main.add_argument("--version", action="version", version=__version__)
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    sub = command("train", train, "Train on this machine; starts the deepspeed launcher when there are more processes.")
    sub.add_argument("config", help="YAML file of the run (configs/)")
    add_training_flags(sub)

    sub = command("prepare", prepare, "Turn text, jsonl or parquet files into a tokenizer and token sets.")
    sub.add_argument("config", help="YAML file whose section `data` says what to prepare")

    sub = command("config", show_config, "Print every resolved value of a configuration.")
    sub.add_argument("config", help="YAML file of the run")

    sub = command("evaluate", evaluate, "Perplexity of every exit of a run, by the `blocks` convention.")
    sub.add_argument("run_folder", metavar="RUN", help="run folder")
    sub.add_argument("--data", action="append", metavar="FILES", help="text or jsonl files (a glob), or a prepared set")
    sub.add_argument("--step", type=int, help="checkpoint to evaluate (default: the newest complete one)")
    sub.add_argument("--batch-size", type=int, default=8, help="windows at once (default: 8)")
    sub.add_argument("--processes", type=int, default=1, help="processes that share the windows (default: 1)")
    sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")

    sub = command("report", report, "What runs came to: tables of every exit and stage, and a plot of the losses.")
    sub.add_argument("run_folders", metavar="RUN", nargs="+", help="run folder")
    sub.add_argument("--baselines", action="store_true", help="add unigram and bigram models of the training text")

    sub = command("export", export, "Write a Hugging Face model folder from a run.")
    sub.add_argument("run_folder", metavar="RUN", help="run folder")
    sub.add_argument("out", metavar="OUT", help="folder to write; it must be empty or not exist")
    sub.add_argument("--step", type=int, help="checkpoint to export (default: the newest complete one)")
    return main


def train(args: argparse.Namespace) -> None:
    config = configuration.load(args.config, args.overrides)
    assert config.run.dir is not None
    # All that one process can check and make is done before others are started.
    run_folder.check(Path(config.run.dir), config, args.resume, args.overwrite)
    import torch

    from lptransformer.prepare import prepare_all
    from lptransformer.processes import check_devices

    check_devices(config.parallel.channel, config.parallel.data)
    prepared = prepare_all(**config.data.model_dump())
    if args.resume:
        run_folder.check_data(Path(config.run.dir), prepared.folders())
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed chooses anyway, with a warning
    processes = config.parallel.pipeline * config.parallel.data
    if processes > 1:
        flags = [flag for flag in ("--resume", "--overwrite") if getattr(args, flag[2:])]
        raise SystemExit(launch(args.config, [*flags, *args.overrides], processes))
    from lptransformer.train import train as train_here

    train_here(config, args.resume, args.overwrite)


def prepare(args: argparse.Namespace) -> None:
    config = configuration.load(args.config, args.overrides)
    from lptransformer.prepare import prepare_all
    from lptransformer.progress import table

    prepared = prepare_all(**config.data.model_dump())
    sets = [(f"train: {one.name}", one.tokens) for one in prepared.train]
    sets += [(f"valid: {name}", tokens) for name, tokens in prepared.valid.items()]
    columns = ("set", "tokens", "windows", "bytes", "words", "folder")
    rows = [
        (name, s.manifest["tokens"], len(s), s.manifest["bytes"], s.manifest["words"], str(s.folder))
        for name, s in sets
    ]
    table(f"tokenizer: {prepared.tokenizer.vocab_size} ids, {prepared.tokenizer_folder}", columns, rows)


def show_config(args: argparse.Namespace) -> None:
    print(configuration.to_yaml(configuration.load(args.config, args.overrides)), end="")


def evaluate(args: argparse.Namespace) -> None:
    no_overrides(args)
    from lptransformer.evaluate import evaluate_run, print_evaluations, to_json

    results = evaluate_run(
        Path(args.run_folder), args.data, step=args.step, batch_size=args.batch_size, processes=args.processes
    )
    if results is not None:  # of several processes, the first one has them
        print(to_json(results)) if args.json else print_evaluations(results)


def report(args: argparse.Namespace) -> None:
    no_overrides(args)
    from lptransformer.report import report as report_run

    for folder in args.run_folders:
        report_run(Path(folder), baselines=args.baselines)


def export(args: argparse.Namespace) -> None:
    no_overrides(args)
    from lptransformer.export import export_run

    update = export_run(Path(args.run_folder), Path(args.out), step=args.step)
    print(f"{args.out}: the model of {args.run_folder} after {update} updates")


def no_overrides(args: argparse.Namespace) -> None:
    if args.overrides:
        raise UserError(f"{args.overrides[0]!r} on the command line: `{args.command}` takes no such argument")


if __name__ == "__main__":
    run(parser())
