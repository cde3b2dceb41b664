"""Starting a program: command line to exit code, the deepspeed launcher around `worker`, signals to the workers."""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from lptransformer.config.checks import check_world_size
from lptransformer.config.load import load
from lptransformer.config.schema import PLAIN, SECTIONS, Config
from lptransformer.errors import ConfigError, DataError, ModelError, RunError, TrainingError, UserError
from lptransformer.run_folder import history, layout
from lptransformer.run_folder.history import COMMAND_VARIABLE, command_line

DEVICES_VARIABLE = "LPTRANSFORMER_VISIBLE_DEVICES"
WORKER = "lptransformer.training.launcher"  # the module that a launcher starts in every process


def add_training_flags(sub: argparse.ArgumentParser) -> None:
    """The flags of `train`, the same here and in launch/train.py."""
    sub.add_argument("--resume", action="store_true", help="continue the run in run.dir from its newest checkpoint")
    text = "with --resume: from the checkpoint after N updates; newer ones are set aside, in checkpoints/set-aside"
    sub.add_argument("--step", type=int, metavar="N", help=text)
    sub.add_argument("--overwrite", action="store_true", help="replace the run in run.dir")
    text = "stop after update N, evaluated and saved; --resume goes on (the learning rate goes by train.steps)"
    sub.add_argument("--until", type=int, metavar="N", help=text)
    sub.add_argument("--force", action="store_true", help="start even where the memory is predicted not to do")


def read_config(args: argparse.Namespace) -> Config:
    """The configuration of a command: of its file, if one is named, and of what was typed; says what gives way."""
    config = load(args.config or {}, args.overrides)
    if COMMAND_VARIABLE not in os.environ and os.environ.get("RANK", "0") == "0":
        for note in config.notes:
            print(f"lptransformer: {note}", file=sys.stderr, flush=True)
    return config


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> None:
    """Parse, run, and turn errors into one line and an exit code."""
    words = with_equals(sys.argv[1:] if arguments is None else arguments)
    keys = [word for word in words if is_key(word)]  # argparse takes one whose value has a blank for CONFIG
    args, others = parser.parse_known_args([word for word in words if not is_key(word)])
    args.overrides = keys + others
    try:
        args.run(args)
    except UserError as error:
        print(f"lptransformer: {error}; next: `{next_command(error, args, words)}`", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except TrainingError as error:
        print(f"lptransformer: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def next_command(error: UserError, args: argparse.Namespace, words: Sequence[str]) -> str:
    """What to type after a refusal: what the error says, else what checks a run without starting it, else the help."""
    program, name = history.program(), getattr(args, "command", "train")  # no command: of a launcher's process
    typed = list(words) if hasattr(args, "command") else [name, *words]
    added = error.change.get("", "").split()
    replaced = {word.partition("=")[0] for word in added}
    kept = [changed_word(word, error.change) for word in typed if word.partition("=")[0] not in replaced]
    changed = [word for word in kept if word] + added
    if error.command:
        return f"{program} {error.command}"
    if changed != typed:
        return f"{program} {shlex.join(changed)}"
    if name == "train" and isinstance(error, ConfigError | DataError | ModelError):
        if args.config is None or not Path(args.config).exists():
            return f"{program} init --data FILES > {args.config or 'run.yaml'}"
        # What was typed is wrong, or the file is: every key with its meaning, or the check of a file that is mended.
        return f"{program} " + (f"config {args.config}" if args.overrides else f"train {args.config} --dry-run")
    return f"{program} {name} --help"


def changed_word(word: str, change: Mapping[str, str]) -> str:
    """A word as `change` has it, where it names the word, or the flag or key before its value; empty: left out."""
    if word in change:
        return change[word]
    name, equals, value = word.partition("=")
    new = change.get(name, name) if equals else name
    return f"{new}{equals}{value}" if new else ""


def is_key(word: str) -> bool:
    """Whether a word is `--section.key=VALUE`; `--data` alone is a flag of some commands."""
    name, equals, _ = word.partition("=")
    section, dot, _ = name.removeprefix("--").partition(".")
    known = section in PLAIN or (section in SECTIONS and (bool(dot) or section != "data"))
    return word.startswith("--") and bool(equals) and known


def with_equals(arguments: Sequence[str]) -> list[str]:
    """Keys of the configuration that are typed with a blank before their value, `--train.steps 4`, with a = there."""
    joined: list[str] = []
    for argument in arguments:
        key = joined[-1].removeprefix("--") if joined and joined[-1].startswith("--") else ""
        known = key.partition("=")[0].partition(".")[0] in (*SECTIONS, *PLAIN)
        if known and ("=" not in key or key.endswith("=")) and not argument.startswith("--"):
            joined[-1] = f"{joined[-1].removesuffix('=')}={argument.removeprefix('=')}"
        else:
            joined.append(argument)
    return joined


def launch(arguments: Sequence[str], processes: int) -> int:
    """Train in `processes` processes on this machine, through the deepspeed launcher; returns its exit code.

    Stop signals are forwarded to the workers alone, which then save and leave; the launcher itself would kill what
    takes longer than 30 seconds. Where the launcher is killed the workers notice, save and leave too; this returns when
    the last of them has gone.
    """
    from lptransformer.processes import COMMAND_PID_VARIABLE, own_command, stop_signals

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RunError("WORLD_SIZE is set: a launcher has started `train`. Let it start launch/train.py instead")
    environment = {**os.environ, COMMAND_VARIABLE: json.dumps(command_line()), **own_command()}
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # the launcher sets its own where it is given a number of processes
        environment[DEVICES_VARIABLE] = os.environ["CUDA_VISIBLE_DEVICES"]
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=error", f"--num_gpus={processes}"]
    command += [f"--master_port={own_free_port()}", "--module", WORKER]
    launcher = subprocess.Popen([*command, *arguments], env=environment, start_new_session=True)

    signals = 0

    def forward(signum: int, frame: Any) -> None:
        nonlocal signals
        signals += 1
        found = workers(COMMAND_PID_VARIABLE)
        if not found or signals >= 3:  # nothing to save yet, or they do not react: end the launcher's whole session
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGTERM if signals < 3 else signal.SIGKILL)
        for worker in found:
            with contextlib.suppress(psutil.Error):
                worker.send_signal(signal.SIGTERM)

    for signum in stop_signals():
        signal.signal(signum, forward)
    code = launcher.wait()
    while left := workers(COMMAND_PID_VARIABLE):
        psutil.wait_procs(left, timeout=1)
    return 130 if signals and code not in (0, 1, 2) else code


def workers(variable: str) -> list[psutil.Process]:
    """The training processes that this command has started, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if (
                WORKER in words
                and "deepspeed.launcher.runner" not in words
                and "deepspeed.launcher.launch" not in words
            ):
                found += [process] * (process.environ().get(variable) == str(os.getpid()))
    return found


def exit_code(folder: Path, before: int | None, code: int = 0) -> int:
    """What a loop around `train` can trust: 0 finished (or came to --until), 1 failed, 2 refused, 3 stopped before its
    end and saved, 4 lost a process, 130 interrupted before there was anything to save.

    `code` is that of the launcher, which is 0 for much. `before` is what `end_written` gave before the start.
    """
    own = (socket.gethostname(), os.getpid())  # a run that has taken this one's folder over has an end of its own
    how = history.read_end(folder, own) if end_written(folder) != before else None
    of_ends = {"finished": 0, "failed": 1, "stopped": 3, "lost a process": 4}
    return of_ends[how] if how is not None else code if code in (1, 2, 130) else 4


def end_written(folder: Path) -> int | None:
    """When the end of a run was written into its folder, for `exit_code`."""
    path = folder / history.ENDED
    return path.stat().st_mtime_ns if path.is_file() else None


def own_free_port() -> int:
    """A port that is free on this host."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def encode(arguments: Sequence[str]) -> str:
    """Arguments of `main` as one word, which no shell splits or expands."""
    return base64.urlsafe_b64encode(json.dumps(list(arguments)).encode()).decode()


def decode(word: str) -> list[str]:
    """The inverse of `encode`."""
    found: list[str] = json.loads(base64.urlsafe_b64decode(word))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """One training process, as a launcher (deepspeed, torchrun) starts it."""
    text = "One training process; start it with `deepspeed` or `torchrun`."
    parser = argparse.ArgumentParser(description=text, allow_abbrev=False)
    parser.add_argument("config", nargs="?", help="YAML file of the run")
    parser.add_argument("--config", dest="config_option", metavar="CONFIG", help="the same")
    parser.add_argument("--encoded", help=argparse.SUPPRESS)  # all arguments in one word (training/hosts.py)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK says it
    add_training_flags(parser)
    parser.set_defaults(run=worker)
    given, _ = parser.parse_known_args(arguments)
    if given.encoded is not None:
        arguments = decode(given.encoded)
    run(parser, arguments)


def worker(args: argparse.Namespace) -> None:
    if DEVICES_VARIABLE in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ[DEVICES_VARIABLE]  # before torch is imported
    if args.config is not None and args.config_option is not None:
        raise ConfigError(f"{args.config} and --config={args.config_option}: give one file")
    args.config = args.config or args.config_option
    config = read_config(args)
    check_world_size(config, int(os.environ.get("WORLD_SIZE", "1")))
    layout.check_until(config, args.until, args.resume and os.environ.get("RANK", "0") == "0", args.step)
    from lptransformer.processes import watch_launchers
    from lptransformer.training.train import train

    watch_launchers()
    train(config, args.resume, args.overwrite, args.until, args.force, args.step)


if __name__ == "__main__":
    main()
