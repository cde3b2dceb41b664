"""Starting a program: command line to exit code, the deepspeed launcher around `worker`, signals to the workers."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lptransformer import config as configuration
from lptransformer.errors import RunError, TrainingError, UserError


def add_training_flags(sub: argparse.ArgumentParser) -> None:
    """The flags of `train`, the same here and in launch/train.py."""
    sub.add_argument("--resume", action="store_true", help="continue the run in run.dir from its newest checkpoint")
    sub.add_argument("--overwrite", action="store_true", help="replace the run in run.dir")


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> None:
    """Parse, run, and turn errors into one line and an exit code."""
    args, overrides = parser.parse_known_args(arguments)
    args.overrides = overrides
    try:
        args.run(args)
    except (UserError, TrainingError) as error:
        print(f"lptransformer: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def launch(config_path: str, arguments: Sequence[str], processes: int) -> int:
    """Train in `processes` processes on this machine, through the deepspeed launcher; returns its exit code.

    Ctrl-C and SIGTERM are handed on to the workers alone, which then save and leave; the launcher itself would kill
    what takes longer than 30 seconds.
    """
    if os.environ.get("WORLD_SIZE"):
        raise RunError("WORLD_SIZE is set: a launcher has started `train`. Let it start launch/train.py instead")
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=error", f"--num_gpus={processes}"]
    command += [f"--master_port={_free_port()}", "--module", "lptransformer.launcher", "--config", config_path]
    launcher = subprocess.Popen([*command, *arguments], env=environment, start_new_session=True)

    def hand_on(signum: int, frame: Any) -> None:
        for worker in _workers(launcher.pid):
            worker.send_signal(signal.SIGTERM)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, hand_on)
    return launcher.wait()


def _workers(runner: int) -> list[Any]:
    """The training processes: the runner starts one launcher, the launcher starts them."""
    import psutil  # deepspeed needs it

    return [worker for one in psutil.Process(runner).children() for worker in one.children()]


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """One training process, as a launcher (deepspeed, torchrun) starts it."""
    parser = argparse.ArgumentParser(description="One training process; start it with `deepspeed` or `torchrun`.")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK says it
    add_training_flags(parser)
    parser.set_defaults(run=worker)
    run(parser, arguments)


def worker(args: argparse.Namespace) -> None:
    config = configuration.load(args.config, args.overrides)
    configuration.check_world_size(config, int(os.environ.get("WORLD_SIZE", "1")))
    from lptransformer.train import train

    train(config, args.resume, args.overwrite)


if __name__ == "__main__":
    main()
