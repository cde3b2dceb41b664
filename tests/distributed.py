"""A pool of worker processes for tests that need several: started once for many tests, because imports cost seconds.

    results = pool.run(4, function, argument, timeout=60)     # by global rank

`pool` is a fixture of the whole session (conftest.py). The function is found by its name, so it stands at the top of a
test module. Each job has the environment that a launcher would give it, and leaves no process group behind.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import psutil

START_SECONDS = 120.0
GRACE_SECONDS = 10.0  # for the other ranks, once a rank has failed
LOG_CHARACTERS = 3000
MOST_THREADS = 100  # of a worker: ZeRO 3 and failures leave groups behind, whose threads never rest
FIXED_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}


# ---------------------------------------------------------------------------------------------- the test's side


@dataclass
class Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    folder: Path  # output.txt: stdout and stderr; stack.txt: stacks of all threads, on SIGUSR1

    def output_from(self, start: int) -> str:
        with open(self.folder / "output.txt", "rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")[-LOG_CHARACTERS:].strip()


class Pool:
    """Worker processes, started when first needed and used again; `close()` ends them."""

    def __init__(self) -> None:
        self.workers: list[Worker] = []
        self.folder = Path(tempfile.mkdtemp(prefix="workers-"))
        self.started = 0

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        timeout: float = 120.0,
        env: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """Call `function(*args)` in `world_size` processes at once; the results by global rank.

        The function, its arguments and its results must be picklable, the function by name. `env` is added to the
        environment for this job. `timeout` is in seconds and does not count the start of workers.

        Raises RuntimeError when a process has died; otherwise what the first failing rank raised; TimeoutError when
        ranks have not answered in time. Ranks, tracebacks, stacks and output are in the notes. After a death or a
        timeout all workers are killed, and the next job starts new ones. What a job changes in its process beyond
        environment, process groups and signal handlers (random state, say) is there in the next.
        """
        job = pickle.dumps((function, args))  # a lambda or a local function raises here, before anything has started
        self._start(world_size)
        workers = self.workers[:world_size]
        starts = [(worker.folder / "output.txt").stat().st_size for worker in workers]
        port = free_port()
        for rank, worker in enumerate(workers):
            message = (launcher_environment(rank, world_size, port) | dict(env or {}), list(sys.path), job)
            with contextlib.suppress(BrokenPipeError):  # a dead worker: found below
                worker.connection.send_bytes(pickle.dumps(message))

        answers, dead = self._collect(workers, timeout)
        silent = [rank for rank in range(world_size) if rank not in answers and rank not in dead]
        failed = sorted((answer["time"], rank) for rank, answer in answers.items() if "error" in answer)
        if not (silent or dead or failed):
            if any(answer.get("worn") for answer in answers.values()):
                self.kill()
            return [pickle.loads(answers[rank]["result"]) for rank in range(world_size)]

        notes = [f"rank {rank} raised:\n{answers[rank]['traceback']}" for _, rank in failed]
        notes += [f"rank {rank} died with exit code {workers[rank].process.wait()}" for rank in dead]
        notes += [f"rank {rank} had not answered; it was at\n{stack(workers[rank])}" for rank in silent]
        outputs = [worker.output_from(start) for worker, start in zip(workers, starts, strict=True)]
        notes += [f"output of rank {rank}:\n{output}" for rank, output in enumerate(outputs) if output]
        if silent or dead or any(answer.get("dirty") for answer in answers.values()):
            self.kill()
        name = function.__qualname__
        error: BaseException
        if dead:
            error = RuntimeError(f"ranks {dead} of {world_size} died in {name}")
        elif failed:
            error = pickle.loads(answers[failed[0][1]]["error"])
        else:
            error = TimeoutError(f"ranks {silent} of {world_size} had not answered {name} in {timeout} s")
        for note in notes:
            error.add_note(note)
        raise error

    def _collect(self, workers: list[Worker], timeout: float) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """Answers by rank, and the ranks whose process died. Stops waiting soon after the first failure."""
        answers: dict[int, dict[str, Any]] = {}
        dead: list[int] = []
        deadline = time.monotonic() + timeout
        while waiting := {w.connection: r for r, w in enumerate(workers) if r not in answers and r not in dead}:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    answers[rank] = pickle.loads(workers[rank].connection.recv_bytes())
                except (EOFError, ConnectionResetError):
                    dead.append(rank)
                if rank in dead or "error" in answers[rank]:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        return answers, dead

    def _start(self, count: int) -> None:
        """Have at least `count` living workers."""
        if any(worker.process.poll() is not None for worker in self.workers):
            self.kill()
        new = [self._spawn() for _ in range(count - len(self.workers))]
        self.workers += new
        for worker in new:
            if not worker.connection.poll(START_SECONDS):
                self.kill()
                raise TimeoutError(f"a worker did not start in {START_SECONDS} s")
            try:
                worker.connection.recv_bytes()
            except EOFError:
                self.kill()
                raise RuntimeError(f"a worker died when it started:\n{worker.output_from(0)}") from None

    def _spawn(self) -> Worker:
        folder = self.folder / str(self.started)
        folder.mkdir()
        self.started += 1
        ours, theirs = Pipe()
        with theirs, open(folder / "output.txt", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(folder / "stack.txt")],
                env=os.environ | FIXED_ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what a worker starts can be ended with it
            )
        return Worker(process, ours, folder)

    def kill(self) -> None:
        """End all workers, and the processes that they started, at once."""
        for worker in self.workers:
            if worker.process.poll() is None:
                os.killpg(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
            worker.connection.close()
        self.workers = []

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def launcher_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What `deepspeed` and `torchrun` set for a process on a single node."""
    size = str(world_size)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "LOCAL_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stack(worker: Worker) -> str:
    """Where a worker's threads are, even if they are inside a library's C code."""
    file = worker.folder / "stack.txt"
    before = file.stat().st_size
    worker.process.send_signal(signal.SIGUSR1)
    for _ in range(20):
        time.sleep(0.1)
        if file.stat().st_size > before:
            time.sleep(0.1)  # the rest of it
            break
    return file.read_text(errors="replace")[before:].strip() or "(no stack: the process does not run)"


# ------------------------------------------------------------------------------------------- the worker's side


def serve(connection: Connection, stack_file: str) -> None:
    """Answer jobs until the other side is gone."""
    with open(stack_file, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        import torch

        connection.send_bytes(b"ready")
        environment, folder = dict(os.environ), os.getcwd()
        while True:
            try:
                message = connection.recv_bytes()
            except EOFError:
                return
            torch.set_num_threads(1)
            answer = perform(*pickle.loads(message))
            answer |= leave(answer)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            connection.send_bytes(pickle.dumps(answer))


def perform(environment: dict[str, str], path: list[str], job: bytes) -> dict[str, Any]:
    """Do one job. The answer holds `result`, or `error`, `traceback` and the time at which it was raised."""
    os.environ.update(environment)
    sys.path += [entry for entry in path if entry not in sys.path]
    try:
        function, args = pickle.loads(job)
        return {"result": pickle.dumps(function(*args))}
    except BaseException as error:  # SystemExit and pytest's own outcomes too
        return failure(error)


def failure(error: BaseException) -> dict[str, Any]:
    now, text = time.monotonic(), traceback.format_exc()
    if isinstance(error, KeyboardInterrupt | GeneratorExit):
        error = RuntimeError(repr(error))  # raised in the test process it would end pytest
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)  # exceptions with arguments of their own often fail here only
    except Exception:
        pickled = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return {"error": pickled, "traceback": text, "time": now}


def leave(answer: dict[str, Any]) -> dict[str, Any]:
    """Take down what the job has left, so that the next one starts from nothing. A failure here is one of the job."""
    try:
        world, torch = sys.modules.get("lptransformer.engine.process_groups"), sys.modules["torch"]
        if world is not None and hasattr(world, "leave"):
            world.leave()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        forget_zero3()
        gc.collect()
        return {"worn": True} if psutil.Process().num_threads() > MOST_THREADS else {}
    except BaseException as error:
        return {"dirty": True} | ({} if "error" in answer else failure(error))


def forget_zero3() -> None:
    """DeepSpeed numbers modules and parameters through the life of a process and compares the numbers between ranks.

    Ranks that have had different jobs before would disagree, so each job counts from nothing.
    """
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload is not None:
        offload.FWD_MODULE_STACK.clear()
        offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
        sys.modules["deepspeed.runtime.zero.partition_parameters"].Init.param_id = 0


def end_with(parent: int) -> None:
    """End this process when the test process is gone, whatever it is doing."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    os.set_inheritable(int(sys.argv[1]), False)
    serve(Connection(int(sys.argv[1])), sys.argv[2])
