"""Whether a run ends when its channels wait as NCCL's do: real processes on the CPU over gloo, with NCCL's rules.

    python benchmarks/fake_cuda/nccl_channel.py --objective.name=overlapping
    python benchmarks/fake_cuda/nccl_channel.py --rules synchronise --config configs/quickstart.yaml --train.steps=6

    communicator  the first call of a channel makes its communicator: the calling thread waits until its peer calls too
                  (eager_connect_single_device on both ends does it beforehand)
    synchronise   what is posted is a kernel: who synchronises the device waits until it is done. Every forward,
                  backward and step of a DeepSpeed engine does so here, as what frees memory or gathers weights may
    one_queue     the operations of a device run one after another, in the order in which they were posted

Exit code 0 when every process has ended, 3 when one waits for what cannot come, what was posted and never used
included: what, and where, is printed.
Other arguments are overrides of the configuration, by default a small GPT-2 on two pipeline ranks.
"""

from __future__ import annotations

import argparse
import os
import queue
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RULES = ("communicator", "synchronise", "one_queue")
HANG = 3
SMALL = """
model: {hidden_size: 16, num_layers: 4, num_heads: 2}
data: {train: TEXT, valid: TEXT, tokenizer: bytes, sequence_length: 16, cache: FOLDER}
parallel: {pipeline: 2}
train: {steps: 6, eval_every: 4, micro_batch_size: 2, micro_batches_per_update: 4}
"""


def parser() -> argparse.ArgumentParser:
    about, _, more = __doc__.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    main = argparse.ArgumentParser(description=about, epilog=more, formatter_class=formatter, allow_abbrev=False)
    main.add_argument("--config", metavar="FILE", help="YAML file of a run (default: a small GPT-2)")
    main.add_argument("--processes", type=int, default=2, metavar="N", help="processes of the run (default: 2)")
    main.add_argument("--rules", default=",".join(RULES), help="which rules hold (default: all)")
    main.add_argument("--patience", type=float, default=20, metavar="S", help="seconds that are a hang (default: 20)")
    main.add_argument("--early", action="store_true", help="receives are always posted, as over gloo: what hangs then")
    main.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return main


def hang(what: str) -> None:
    """Say what this process waits for, and from where; end it."""
    frames = [f for f in traceback.extract_stack() if "/lptransformer/" in f.filename or "/deepspeed/" in f.filename]
    calls = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames[-4:])]
    print(f"hang: process {os.environ['RANK']} waits for {what}, in {' < '.join(calls)}", flush=True)
    os._exit(HANG)


class Work:
    """An operation on the device: under way from the moment it is posted, done when the channel has moved it."""

    def __init__(self, start: Callable[[], Any], name: str, patience: float) -> None:
        self.name, self.patience = name, patience
        self._start, self._done = start, threading.Event()
        self._error: RuntimeError | None = None

    def post(self) -> None:
        """gloo learns of it at once, in the order of posting."""
        self._real = self._start()

    def finish(self) -> None:
        try:
            self._real.wait()
        except RuntimeError as error:
            self._error = error
        self._done.set()

    def is_done(self, patience: float = 0.0) -> bool:
        return self._done.wait(patience)

    def wait(self, *args: Any) -> bool:
        if not self.is_done(self.patience):
            hang(f"{self.name}, which does not come")
        if self._error is not None:
            raise self._error
        return True


class Device:
    """What is posted on it, and the threads that see it through."""

    def __init__(self, rules: set[str], patience: float) -> None:
        self.rules, self.patience = rules, patience
        self.posted: list[Work] = []
        self._queue: queue.Queue[Work] = queue.Queue()
        if "one_queue" in rules:
            threading.Thread(target=self._one_after_another, daemon=True).start()

    def post(self, work: Work) -> Work:
        self.posted = [one for one in self.posted if not one.is_done()]
        self.posted.append(work)
        if "one_queue" in self.rules:
            self._queue.put(work)
        else:
            work.post()
            threading.Thread(target=work.finish, daemon=True).start()
        return work

    def _one_after_another(self) -> None:
        while True:
            work = self._queue.get()
            work.post()
            work.finish()

    def synchronise(self, *args: Any) -> None:
        """What torch.cuda.synchronize() does: wait for all that is posted."""
        if "synchronise" in self.rules:
            for work in self.posted:
                if not work.is_done(self.patience):
                    hang(f"the device, and that for {work.name}, which is not on its way")


def channel(real: type, device: Device) -> type:
    """A class like ProcessGroupNCCL, which follows its rules over gloo."""

    class Options:
        _timeout: Any = None

    class Channel:
        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            self.store, self.rank, self.group = store, rank, real(store, rank, size, options._timeout)
            self.connected, self.numbers = False, {"send": 0, "receive": 0}

        def eager_connect_single_device(self, on: Any) -> None:
            """Make the communicator: returns when the peer does so too."""
            if self.connected or "communicator" not in device.rules:
                return
            self.connected = True
            self.store.set(f"communicator/{self.rank}", "")
            started = time.monotonic()
            while not self.store.check([f"communicator/{1 - self.rank}"]):
                if time.monotonic() - started > device.patience:
                    hang(f"its peer to make the communicator of {self.store.name}")
                time.sleep(0.005)

        def send(self, buffers: Any, peer: int, tag: int) -> Any:
            return self._on_device("send", self.group.send, buffers, peer, tag)

        def recv(self, buffers: Any, peer: int, tag: int) -> Any:
            return self._on_device("receive", self.group.recv, buffers, peer, tag)

        def _on_device(self, what: str, call: Callable[..., Any], *args: Any) -> Any:
            self.eager_connect_single_device(None)
            self.numbers[what] += 1
            name = f"{what} number {self.numbers[what]} of {self.store.name}"
            return device.post(Work(lambda: call(*args), name, device.patience))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.group, name)

    Channel.Options = Options  # type: ignore[attr-defined]
    return Channel


def work(config: str, overrides: list[str], rules: set[str], patience: float, early: bool) -> None:
    """One process of the run."""
    sys.path.insert(0, str(ROOT))  # the checkout, whatever is installed
    import torch.distributed as dist

    class NamedStore(dist.PrefixStore):
        def __init__(self, name: str, store: dist.Store) -> None:
            super().__init__(name, store)
            self.name = name

    import deepspeed  # it derives classes from what is replaced here

    device = Device(rules, patience)
    deepspeed_device = type(deepspeed.accelerator.get_accelerator())
    deepspeed_device.synchronize = lambda accelerator, *args: device.synchronise()
    for name in ("forward", "backward", "step"):
        setattr(deepspeed.DeepSpeedEngine, name, synchronised(getattr(deepspeed.DeepSpeedEngine, name), device))
    for name, value in {"PrefixStore": NamedStore, "ProcessGroupNCCL": channel(dist.ProcessGroupGloo, device)}.items():
        setattr(dist, name, value)
    from lptransformer.engine import p2p
    from lptransformer.training import this_host

    if early:
        p2p.Receiver._always = property(lambda receiver: True, lambda receiver, value: None)  # type: ignore[assignment]

    this_host.check_devices = lambda *args: None  # which would say that there is no GPU
    sys.argv = ["train.py", "--config", config, *overrides, "--parallel.channel=nccl"]
    runpy.run_path(str(ROOT / "launch" / "train.py"), run_name="__main__")
    left = [one.name for one in device.posted if not one.is_done()]
    print(f"process {os.environ['RANK']} has ended; posted and never used: {len(left)}", flush=True)
    os._exit(HANG if left else 0)  # the threads of what is left wait forever


def synchronised(call: Callable[..., Any], device: Device) -> Callable[..., Any]:
    def after_synchronising(*args: Any, **kwargs: Any) -> Any:
        device.synchronise()
        return call(*args, **kwargs)

    return after_synchronising


def run(config: str, overrides: list[str], args: argparse.Namespace) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(args.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--worker", "--rules", args.rules, f"--patience={args.patience}"]
    command += [*(["--early"] if args.early else []), "--config", config, *overrides]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(args.processes)]
    children = [subprocess.Popen(command, env={**os.environ, **common, **rank}) for rank in ranks]
    try:
        while any(child.poll() is None for child in children) and not any(child.poll() for child in children):
            time.sleep(0.05)
    finally:
        for child in children:
            child.kill()
    codes = [child.wait() for child in children]
    code = HANG if HANG in codes else max(abs(code) for code in codes)
    print({0: "every process has ended", HANG: "the run hangs"}.get(code, f"the run broke: {codes}"))
    return code


def main(arguments: list[str] | None = None) -> int:
    args, overrides = parser().parse_known_args(arguments)
    rules = set(args.rules.split(",")) - {""}
    if rules - set(RULES):
        parser().error(f"--rules={args.rules}: there are {', '.join(RULES)}")
    if args.worker:
        work(args.config, overrides, rules, args.patience, args.early)
    with tempfile.TemporaryDirectory() as folder:
        config = args.config
        if config is None:
            text, config = Path(folder, "text.txt"), str(Path(folder, "run.yaml"))
            text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
            Path(config).write_text(SMALL.replace("TEXT", str(text)).replace("FOLDER", folder))
        return run(config, [f"--run.dir={folder}/run", *overrides], args)


if __name__ == "__main__":
    raise SystemExit(main())
