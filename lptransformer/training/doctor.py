"""`doctor`: whether a run would start here, or on every host of a file, before it is tried.

Every host is asked by ssh (training/this_host.py), with this Python at the same place, as `train --hostfile` starts it
there; without a file this host is asked without ssh. The answers become rows, and a row that is red says what to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from lptransformer.config.schema import Config
from lptransformer.console import print_table
from lptransformer.errors import UserError
from lptransformer.planning.disk import checkpoint_bytes
from lptransformer.planning.dry_run import unprepared
from lptransformer.store import INTERFACE_HELP, is_loopback
from lptransformer.training import memory
from lptransformer.training.hosts import SSH, handed_on, in_quotes, placement, read_hostfile
from lptransformer.training.this_host import ANSWER, ELSEWHERE, HostFacts, Question, built_for, options

ANSWER_SECONDS = 90.0  # a first import of torch from a shared disk takes its time
LEAVE_SECONDS = 10.0
CLOCK_SECONDS = 0.5  # further apart, traces and times of files mislead
LEAST_DISK, LEAST_SHARED, LEAST_SHARED_NCCL = 2**30, 2**24, 2**30
SHOWN = ("lptransformer", "python", "torch", "deepspeed", "transformers")  # of the versions that are compared
SETUP = "bash launch/setup.sh"


@dataclass(frozen=True)
class Row:
    """`remedy` is what to do; a row that has one is red."""

    check: str
    host: str
    found: str
    remedy: str = ""


@dataclass
class Asked:
    """A host that is being asked: its process here, and what it has said. `problem` is why it says nothing (more)."""

    process: subprocess.Popen[str]
    by_ssh: bool
    facts: HostFacts | None = None
    problem: str = ""
    reached: list[str] = field(default_factory=list)
    sees: bool = True
    skew: float = 0.0  # seconds that its clock is off by, at least


def examine(config: Config | None, hostfile: str | None) -> list[Row]:
    """All rows. Raises UserError for a hosts file that cannot be read, and for what the configuration refuses."""
    hosts = read_hostfile(hostfile) if hostfile is not None else {"localhost": processes_of(config)}
    rows = list(programs_and_slots(config, hosts)) if hostfile is not None else []
    if hostfile is not None and not shutil.which("ssh"):
        return rows  # nobody can be asked
    asked = ask(config, hosts, by_ssh=hostfile is not None)
    rows += [row for name, one in asked.items() for row in answered(name, one)]
    known = {name: one.facts for name, one in asked.items() if one.facts is not None}
    rows += [row for check in (versions, devices, nccl, shared_memory) for row in check(known)]
    rows += [] if config is None else [*lacking_for(config, known), *build_tools(known, built_for(config))]
    rows += disks(known, 0 if config is None else on_disk(config))
    rows += memories(config, known) if len(known) == len(hosts) else []
    if len(hosts) == 1:
        return [*rows, Row("address", next(iter(hosts)), "127.0.0.1: all processes are on this host")]
    if len(known) == 1:
        return rows  # nobody to meet
    rows += addresses(known)
    return rows + [row for name, one in asked.items() if not one.problem for row in between(name, one, list(known))]


def print_rows(rows: Sequence[Row]) -> bool:
    """Prints the table; returns whether a row is red."""
    lines = [("RED" if row.remedy else "ok", row.check, row.host, row.found, row.remedy) for row in rows]
    styles = ["red" if row.remedy else "" for row in rows]
    print_table("doctor", ("", "check", "host", "found", "what to do"), lines, styles=styles)
    red = sum(bool(row.remedy) for row in rows)
    print(f"{red} of {len(rows)} rows are red" if red else "nothing is in the way of a run")
    return red > 0


def processes_of(config: Config | None) -> int:
    return 1 if config is None else config.parallel.pipeline * config.parallel.data


# ----------------------------------------------------------------------------------------------------------- asking


def ask(config: Config | None, hosts: Mapping[str, int], *, by_ssh: bool) -> dict[str, Asked]:
    """What every host says: about itself, then, when all have answered, about the way to the others."""
    asked = {name: Asked(start(name if by_ssh else None, hosts), by_ssh) for name in hosts}
    try:
        with ThreadPoolExecutor(len(hosts)) as threads:

            def first(name: str) -> None:
                answer = put(asked[name], asdict(question(config, hosts, name)))
                if answer is not None:
                    asked[name].facts = HostFacts(**answer)

            def second(name: str) -> None:
                one, before = asked[name], time.time()
                answer = put(one, {"listening": listening, "mark": mark})
                if answer is not None:
                    early, late = before - answer["clock"], answer["clock"] - time.time()
                    one.reached, one.sees, one.skew = answer["reached"], answer["sees"], max(0.0, early, late)

            list(threads.map(first, asked))
            found = [one.facts for one in asked.values() if one.facts is not None]
            listening = [(one.host, one.address, one.interface, one.port) for one in found]
            mark = next((one.mark for one in found if one.mark), "")
            list(threads.map(second, [name for name, one in asked.items() if one.facts is not None]))
    finally:
        for one in asked.values():
            end(one.process)
    return asked


def end(process: subprocess.Popen[str]) -> None:
    """Its input ends, so it goes, there too; killed here where it does not."""
    try:
        process.communicate(timeout=LEAVE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def start(host: str | None, hosts: Mapping[str, int]) -> subprocess.Popen[str]:
    """The program that asks a host, there by ssh, in this folder and with the variables of a run."""
    command = [sys.executable, "-m", "lptransformer.training.this_host"]
    if host is not None:
        variables = handed_on(hosts) | {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
        exports = " ".join(f'{name}="{in_quotes(value)}"' for name, value in variables.items())
        command = [*SSH, host, f"cd {shlex.quote(os.getcwd())} && env {exports} {shlex.join(command)}"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def question(config: Config | None, hosts: Mapping[str, int], name: str) -> Question:
    run, cache, parallel = ".", ".", None
    if config is not None:
        assert config.run.dir is not None
        run, cache, parallel = config.run.dir, config.data.cache, config.parallel
    return Question(
        hosts=list(hosts),
        processes=hosts[name],
        folders=list(dict.fromkeys([run, cache])),
        channel="gloo" if parallel is None else parallel.channel,
        replicas=1 if parallel is None else parallel.data,
        engine="local" if config is None else config.engine,
        options={} if config is None else options(config),
        built_for=[] if config is None else built_for(config),
        mark=run if name == next(iter(hosts)) else None,
    )


def put(asked: Asked, question: Mapping[str, Any]) -> dict[str, Any] | None:
    """The answer of a host; None, with the problem noted, where there is none in time."""
    process = asked.process
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    timer = threading.Timer(ANSWER_SECONDS, process.kill)
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            if line.startswith(ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return found
    finally:
        late = not timer.is_alive()
        timer.cancel()
    said = process.stderr.read().strip().splitlines()
    code = process.wait()
    asked.problem = f"no answer in {ANSWER_SECONDS:g} s" if late else said[-1] if said else f"exit code {code}"
    return None


# ------------------------------------------------------------------------------------------------------------- rows


def programs_and_slots(config: Config | None, hosts: Mapping[str, int]) -> Iterator[Row]:
    for program, package in (("ssh", "openssh-client"), ("pdsh", "pdsh")):
        if found := shutil.which(program):
            yield Row(f"program {program}", "here", found)
        else:
            yield Row(f"program {program}", "here", "not installed", f"install it (apt-get install {package})")
    if config is not None:
        try:
            placed = "; ".join(placement(hosts, config.parallel.pipeline, config.parallel.data))
            yield Row("slots", "all", placed)
        except UserError as error:
            yield Row("slots", "all", str(error), "change the hosts file, or parallel.pipeline and parallel.data")


def answered(name: str, asked: Asked) -> Iterator[Row]:
    check = "ssh" if asked.by_ssh else "program"
    if not asked.problem:
        yield Row(check, name, "answers")
    elif asked.process.returncode == 255 and asked.by_ssh:
        remedy = f"`ssh {name} true` must work without a password"
        if "resolve" in asked.problem:
            remedy = "mend the name in the hosts file, or add it to /etc/hosts"
        elif "refused" in asked.problem:
            remedy = "start sshd there"
        yield Row(check, name, asked.problem, remedy)
    else:
        yield Row(
            check, name, asked.problem, f"`{SETUP}` in the same folder there; then `{sys.executable} -m pip check`"
        )


def versions(known: Mapping[str, HostFacts]) -> Iterator[Row]:
    """Every package is there, and the same on all hosts."""
    first: dict[str, str | None] = {}
    for name, facts in known.items():
        found = facts.versions
        missing = [package for package, version in found.items() if version is None and package != "commit"]
        others = [f"{package} {found[package]}" for package in found if first and found[package] != first[package]]
        theirs = [f"{package} {first[package]}" for package in found if first and found[package] != first[package]]
        if missing:
            yield Row("versions", name, f"not installed: {', '.join(missing)}", f"`{SETUP}` there")
        elif others:
            remedy = f"{next(iter(known))} has {', '.join(theirs)}: the same checkout and `{SETUP}` on both"
            yield Row("versions", name, ", ".join(others), remedy)
        else:
            yield Row("versions", name, ", ".join(f"{one} {found[one]}" for one in SHOWN) if not first else "the same")
        first = first or found


def devices(known: Mapping[str, HostFacts]) -> Iterator[Row]:
    """GPUs, that torch sees them, that there are enough, and the same kinds everywhere."""
    first = next(iter(known.values()), None)
    for name, facts in known.items():
        found = f"{len(facts.gpus)} x {', '.join(sorted(set(facts.gpus)))}, driver {facts.driver}"
        if not facts.gpus:
            found = "no GPU" if facts.driver is None else f"driver {facts.driver}, but torch sees no GPU"
        remedy = facts.devices_problem
        if facts.driver is not None and not facts.gpus:
            built = "for CPUs only" if facts.cuda is None else f"for CUDA {facts.cuda}"
            remedy = f"torch is built {built}: install a build that the driver can run, or a newer driver"
        elif first is not None and bool(first.gpus) != bool(facts.gpus):
            remedy = f"{next(iter(known))} has {len(first.gpus)} GPUs: all hosts or none must have them"
        yield Row("devices", name, found, remedy)


def nccl(known: Mapping[str, HostFacts]) -> Iterator[Row]:
    """Where there are GPUs: replicas talk over it."""
    first = next((facts.nccl for facts in known.values() if facts.nccl), None)
    for name, facts in known.items():
        if facts.gpus and facts.nccl is None:
            yield Row("NCCL", name, "torch has none", "install a build of torch with NCCL")
        elif facts.gpus and facts.nccl != first:
            yield Row("NCCL", name, str(facts.nccl), f"another host has {first}: the same torch everywhere")
        elif facts.gpus:
            yield Row("NCCL", name, str(facts.nccl))


def lacking_for(config: Config, known: Mapping[str, HostFacts]) -> Iterator[Row]:
    """What values of options need, where a host lacks it."""
    for name, facts in known.items():
        for key, why in facts.lacking.items():
            yield Row("option", name, f"for {config.at(key)}: {why}", ELSEWHERE[key])


def build_tools(known: Mapping[str, HostFacts], keys: Sequence[str]) -> Iterator[Row]:
    """Where an option needs them."""
    for name, facts in known.items() if keys else ():
        what = f"for {', '.join(keys)}"
        if facts.build_problem:
            yield Row("compiler", name, f"not found, {what}: {facts.build_problem}", "install it, or leave that out")
        else:
            yield Row("compiler", name, f"found, {what}")


def shared_memory(known: Mapping[str, HostFacts]) -> Iterator[Row]:
    """NCCL and Python's own processes use it; containers have 64 MB unless they are told otherwise."""
    for name, facts in known.items():
        least = LEAST_SHARED_NCCL if len(facts.gpus) > 1 else LEAST_SHARED
        remedy = f"{_size(least)} are needed; of a container: --shm-size" if facts.shared_memory < least else ""
        yield Row("shared memory", name, f"{_size(facts.shared_memory)} free", remedy)


def on_disk(config: Config) -> int:
    """Bytes of all checkpoints that a run leaves."""
    return checkpoint_bytes(config, unprepared(memory.with_size(config, 1))).total


def disks(known: Mapping[str, HostFacts], checkpoints: int) -> Iterator[Row]:
    needed = max(LEAST_DISK, checkpoints)
    what = f"{_size(needed)} are needed" + (" for checkpoints" if checkpoints > LEAST_DISK else "")
    for name, facts in known.items():
        for folder, free in facts.disks.items():
            remedy = f"{what}: make room, or choose another folder" if free < needed else ""
            yield Row("disk", name, f"{_size(free)} free for {folder}", remedy)


def memories(config: Config | None, known: Mapping[str, HostFacts]) -> Iterator[Row]:
    """Free memory; with a configuration, against what is predicted."""
    pools = memory.pools((str(name), int(free)) for facts in known.values() for name, free in facts.memory)
    if config is None or sum(len(pool.ranks) for pool in pools) != processes_of(config):
        yield from (Row("memory", pool.name, f"{_size(pool.free)} free") for pool in pools)
        return
    sized = memory.with_size(config, 1) if config.train.micro_batch_size == "auto" else config
    blueprint = unprepared(sized)
    need = memory.need(sized, blueprint, pools, alike=True)
    if need.share <= 1.0:
        yield Row("memory", need.pool.name, str(need))
    else:
        keys = memory.what_would_fit(sized, blueprint, pools)
        yield Row("memory", need.pool.name, str(need), f"{' and '.join(keys) or memory.SMALLER} would fit")


def addresses(known: Mapping[str, HostFacts]) -> Iterator[Row]:
    """Hosts have names of their own, and addresses that others reach."""
    seen: dict[str, str] = {}
    for name, facts in known.items():
        found = f"{facts.address or 'none'} ({facts.interface})"
        if facts.own_name is not None and is_loopback(facts.own_name):
            found += f"; its name {facts.host} stands for {facts.own_name} there, which is not used"
        remedy = ""
        if not facts.address or is_loopback(facts.address):
            remedy = "set GLOO_SOCKET_IFNAME to the interface that reaches the others, or mend /etc/hosts there"
        elif facts.host in seen:
            remedy = f"{seen[facts.host]} calls itself {facts.host} too: hosts are told apart by `hostname`"
        seen.setdefault(facts.host, name)
        yield Row("address", name, found, remedy)


def between(name: str, asked: Asked, others: Sequence[str]) -> Iterator[Row]:
    """Ports, run folder, clock."""
    problem = next((one for one in asked.reached if one), "")
    ways = f"reaches {', '.join(other for other in others if other != name)}"
    yield Row("ports", name, problem or ways, INTERFACE_HELP if problem else "")
    if asked.sees:
        yield Row("run folder", name, "shared")
    else:
        remedy = "give --run.dir on a disk that all hosts share"
        yield Row("run folder", name, f"what {others[0]} writes there is not seen", remedy)
    if asked.skew > CLOCK_SECONDS:
        yield Row("clock", name, f"off by {asked.skew:.1f} s or more", "synchronise it (NTP): traces would mislead")
    else:
        yield Row("clock", name, "as here")


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
