"""From the result files of throughput.py to tables: on the terminal, and between the markers of a document."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lptransformer.run_folder import history
from lptransformer.study.markdown_tables import ResultTable, markdown, update

Data = Mapping[str, Any]
CHEAP = "ours, chunked, cheap head"


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, memory, system, versions."""
    kept = ("git_commit", "git_changes", "python", "platform", "versions")
    found = {key: value for key, value in history.environment().items() if key in kept}
    information = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in information.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return {"processor": names[0] if names else "unknown", "cores": cores, "memory_gib": round(memory, 1), **found}


def show(found: Data) -> None:
    for table in tables(found):
        print(f"\n{markdown(table)}")
    if "not_measured" in found:
        print(found["not_measured"])


def write(found: Data, path: Path) -> list[str]:
    """Rewrite the tables of a setting in a document; returns the names of those that were written."""
    return update(path, tables(found), found["setting"])


def tables(found: Data) -> list[ResultTable]:
    of_setting = {"real": _real, "emulated": _emulated, "links": _links, "emulated_links": _links}[found["setting"]]
    return [_machine(found), *of_setting(found)]


def _machine(found: Data) -> ResultTable:
    of, versions = found["machine"], found["machine"]["versions"]
    rows: list[tuple[Any, ...]] = [
        ("processor", of["processor"]),
        ("cores", of["cores"]),
        ("memory", f"{of['memory_gib']} GiB"),
        ("python, torch", f"{of['python']}, {versions['torch']}"),
        ("deepspeed, transformers", f"{versions['deepspeed']}, {versions['transformers']}"),
        ("commit", f"{(of['git_commit'] or 'unknown')[:12]}{' and changes' if of['git_changes'] else ''}"),
        ("load average before the run", f"{found['load_before'][0]:.2f}"),
    ]
    if "head_ratio" in found:
        rows.append(("R: FLOPs of the blocks / FLOPs of the model's head", f"{found['head_ratio']:.2f}"))
    return ResultTable("machine", "Machine and versions", ("what", "value"), tuple(rows))


def _real(found: Data) -> Iterator[ResultTable]:
    of_m = {f"m = {case['micro_batches']}": case for case in found["cases"]}
    names = [name for name in found["cases"][0]["contenders"]]

    def grid(cell: Any) -> tuple[tuple[Any, ...], ...]:
        return tuple((name, *(cell(case, name) for case in of_m.values())) for name in names)

    def milliseconds(case: Data, name: str) -> str:
        result = case["contenders"][name]
        return "does not run" if "error" in result else _spread(result, 1e3, 0)

    columns = ("contender", *of_m)
    yield ResultTable("update", "Milliseconds per update: median (least-greatest)", columns, grid(milliseconds))
    for other in found["against"]:

        def speedup(case: Data, name: str, other: str = other) -> str | None:
            one = case["speedups"].get(other, {}).get(name)
            return None if one is None else _spread(one, 1, 2)

        title = f"Times as fast as {other}: median of the repetitions (least-greatest)"
        yield ResultTable(f"against-{_slug(other)}", title, columns, grid(speedup))
    for other in found["against"]:
        yield _against_ideal(found, other)
    yield ResultTable("splits", "Blocks per stage (of ours: per chunk)", columns, grid(_split))

    def waiting(case: Data, name: str) -> str | None:
        shares = case["contenders"][name].get("waiting_share")
        return None if not shares or None in shares else ", ".join(f"{share:.1%}" for share in shares)

    yield ResultTable("waiting", "Waiting for other pipeline ranks, share of the time by rank", columns, grid(waiting))
    yield _stages(found)
    yield _simulated(found)
    yield _errors(found["cases"])


def _against_ideal(found: Data, other: str) -> ResultTable:
    """For ours: how many times as fast as another, and what the simulator gives for ideal execution of both."""
    rows: list[tuple[Any, ...]] = []
    for case in found["cases"]:
        for name, result in case["contenders"].items():
            if result["kind"] != "local" or name not in case["speedups"].get(other, {}):
                continue
            measured = case["speedups"][other][name]["median"]
            ideals = {kind: case["ideal"][other][kind] / own for kind, own in case["ideal"][name].items()}
            ratios = [f"{measured / ideals[kind]:.3f}" for kind in ("plain", "sharing")]
            numbers = [f"{number:.2f}" for number in (measured, ideals["plain"], ideals["sharing"])]
            own = f"{case['ideal'][name]['plain'] / result['median']:.3f}"
            rows.append((name, case["micro_batches"], *numbers, *ratios, own))
    columns: tuple[str, ...] = ("contender", "m", "measured", "ideal", "ideal, sharing memory")
    columns += ("measured / ideal", "measured / ideal, sharing", "own ideal time / own time")
    title = f"Times as fast as {other}: measured, and by the simulator for ideal execution of both"
    return ResultTable(f"ideal-{_slug(other)}", title, columns, tuple(rows))


def _simulated(found: Data) -> ResultTable:
    """Every update that the simulator can predict: measured, simulated, and how far off."""
    rows: list[tuple[Any, ...]] = []
    for case in found["cases"]:
        for name, result in case["contenders"].items():
            if "error" in result:
                continue
            ideal = case["ideal"].get(name, {}) if "ideal" in case else {"plain": result["simulated_seconds"]}
            cells = []
            for kind in ("plain", "sharing") if "ideal" in case else ("plain",):
                if (seconds := ideal.get(kind)) is not None:
                    cells += [f"{1e3 * seconds:.0f}", f"{seconds / result['median'] - 1:+.1%}"]
            if cells:
                rows.append((name, case["ranks"], case["micro_batches"], f"{1e3 * result['median']:.0f}", *cells))
    columns: tuple[str, ...] = ("contender", "ranks", "m", "measured", "simulated", "error")
    columns += ("simulated, sharing memory", "error, sharing") if "ideal" in found["cases"][0] else ()
    return ResultTable("simulator", "Milliseconds per update: measured (median) and simulated", columns, tuple(rows))


def _stages(found: Data) -> ResultTable:
    """The seconds that the ideal is made of, in the last case."""
    rows = []
    for one in found["cases"][-1]["stages"]:
        busy, alone = (sum(of[key] for key in ("forward", "backward", "pull")) for of in (one, one["alone"]))
        parts = [f"{1e3 * one[key]:.1f}" for key in ("forward", "backward", "pull", "update")]
        rows.append((one["contender"], one["stage"], *parts, f"{busy / alone:.2f}"))
    columns = ("contender", "stage", "forward", "backward", "pull", "update", "both ranks at work / alone")
    title = "Stages by themselves, milliseconds per micro-batch (update: per update); the loss is in the forward pass"
    return ResultTable("stages", title, columns, tuple(rows))


def _emulated(found: Data) -> Iterator[ResultTable]:
    for case in found["cases"]:
        rows: list[tuple[Any, ...]] = []
        for name, result in case["contenders"].items():
            if "error" in result:
                rows.append((name, "does not run", *[None] * 6))
                continue
            waiting = result["waiting_share"]
            rows.append(
                (
                    name,
                    _spread(result, 1, 2),
                    f"{result['median'] / case['stage_seconds']:.2f}",
                    f"{result['turn_to_bound']['median']:.3f}",
                    None if None in waiting else f"{max(waiting):.1%}",
                    f"{1 - min(result['asleep_share']):.1%}",
                    f"{max(result['processor_share']):.1%}",
                    _sleep(result),
                )
            )
        ranks, m = case["ranks"], case["micro_batches"]
        columns: tuple[str, ...] = ("contender (emulated)", "seconds per update", "in stage times")
        columns += ("run / (m stage times + one fill)", "waiting, worst rank", "not computing, worst rank")
        columns += ("processor use", "sleep / processor time")
        title = f"Emulated: {ranks} pipeline ranks, m = {m}, {case['stage_seconds']} s per stage and micro-batch"
        title += f", {case['cores']} cores"
        yield ResultTable(f"{ranks}-ranks-m-{m}", title, columns, tuple(rows))
    yield _simulated(found)
    yield _errors(found["cases"])


def _links(found: Data) -> Iterator[ResultTable]:
    emulated = "label" in found
    rows: list[tuple[Any, ...]] = []
    for case in found["cases"]:
        for one in case["limits"]:
            for name, result in one["contenders"].items():
                limit = "none" if one["mbit"] is None else f"{one['mbit']} Mbit/s"
                carried = f"{one['measured_mbit']['median']:.0f}"
                transfer = one["transfer_seconds"] and f"{1e3 * one['transfer_seconds']:.1f}"
                start = (case["size"], name, limit, carried, transfer)
                if "error" in result:
                    rows.append((*start, "does not run", *[None] * (2 + emulated)))
                    continue
                waiting = [share for share in result["waiting_share"] if share is not None]
                slower = _spread(result["to_no_limit"], 1, 3) if "to_no_limit" in result else None
                worst = f"{max(waiting):.1%}" if waiting else None
                cells = (*start, _spread(result, 1e3, 0), slower, worst)
                rows.append((*cells, _sleep(result)) if emulated else cells)
    columns: tuple[str, ...] = ("size", "contender (emulated)" if emulated else "contender", "limit")
    columns += ("measured Mbit/s", "one message, ms", "ms per update", "time / no limit", "waiting, worst rank")
    title = f"Two network namespaces: {found.get('not_measured', 'median (least-greatest)')}"
    if emulated:
        columns, title = (*columns, "sleep / processor time"), f"Emulated. {title}"
    yield ResultTable("update", title, columns, tuple(rows))


def _sleep(result: Data) -> str:
    return f"{result['sleep_to_processor']:.0f}{'' if result['enough_sleep'] else ' (too little)'}"


def _split(case: Data, name: str) -> str | None:
    result = case["contenders"][name]
    if result["partition"]:
        return "-".join(map(str, result["partition"]))
    chunks = [text.partition("=")[2] for text in result["config"] if text.startswith("objective.chunks=")]
    return chunks[0].strip("[]").replace(", ", "-") if chunks else None


def _errors(cases: Any) -> ResultTable:
    rows: list[tuple[Any, ...]] = []
    for case in cases:
        for name, result in case["contenders"].items():
            if "error" in result:
                rows.append((name, case["ranks"], case["micro_batches"], result["error"]))
    columns = ("contender", "ranks", "m", "error")
    return ResultTable("errors", "What does not run, and why", columns, tuple(rows or [("nothing", None, None, None)]))


def _spread(one: Data, factor: float, digits: int) -> str:
    median, low, high = (f"{factor * one[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({low}-{high})"


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
