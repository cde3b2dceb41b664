"""One process of a run on a GPU that is not there: where the host waits for it, what is copied, what is sent.

    python benchmarks/fake_cuda/one_rank.py --parallel.pipeline=2 --train.dtype=bf16
    python benchmarks/fake_cuda/one_rank.py --config configs/quickstart.yaml --rank 1 --parallel.channel=nccl

The last of `--updates` updates is reported: one row for every kind of event and place; `--json` has the reports of the
engine too, in which the device takes `--op-seconds` for an operation and messages come `--late`. A run of one process
evaluates, saves and loads what it saved after that. Exit code 1 where tensors of two devices meet, with the place.
Other arguments are overrides of a configuration (default: a small Llama).

With `--cases` many are observed, each in a process of its own that begins when everything has been imported; FILE is a
JSON list of the arguments of each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "model": {"family": "llama", "hidden_size": 32, "num_layers": 4, "num_heads": 2},
    "data": {"tokenizer": "bytes", "sequence_length": 32},
    "train": {"steps": 100, "micro_batch_size": 2, "micro_batches_per_update": 2},
}
TWO_DEVICES = ("two different devices", "same device")  # what FakeTensorMode and torch say of them


def parser() -> argparse.ArgumentParser:
    about, _, more = __doc__.partition("\n\n")
    formatter = argparse.RawDescriptionHelpFormatter
    main = argparse.ArgumentParser(description=about, epilog=more, formatter_class=formatter, allow_abbrev=False)
    main.add_argument("--config", metavar="FILE", help="YAML file of a run (default: a small Llama)")
    main.add_argument("--rank", type=int, default=0, metavar="N", help="which process, counted from 0 (default: 0)")
    main.add_argument("--updates", type=int, default=3, metavar="N", help="updates that are made (default: 3)")
    main.add_argument("--op-seconds", type=float, default=0.0, metavar="S", help="of the device, each (default: 0)")
    main.add_argument("--late", type=float, default=0.0, metavar="S", help="the wait for a message (default: 0)")
    main.add_argument("--json", metavar="FILE", help="write the events there too")
    main.add_argument("--cases", metavar="FILE", help="arguments of many runs, as JSON; with --json a list is written")
    return main


def observed(
    source: str | dict[str, Any],
    overrides: list[str],
    rank: int,
    updates: int,
    run: Path,
    op_seconds: float = 0.0,
    late: float = 0.0,
) -> dict[str, Any]:
    """The events and reports of the last of the updates, and what went wrong, or None. What is saved is saved into
    `run`."""
    import device
    import peers

    import lptransformer
    from lptransformer.config.load import load

    config = load(source, overrides)
    parallel, train = config.parallel, config.train
    pipeline, shared = parallel.pipeline, config.head.kind == "shared"
    if pipeline > 1 and config.head.ema_decay is not None:
        raise SystemExit("head.ema_decay over several pipeline ranks: the names of its copies are not pretended")
    if shared and config.value("objective.chunks") != pipeline > 1:
        raise SystemExit("head.kind=shared over several pipeline ranks: give as many objective.chunks as ranks")
    others = [stage for stage in range(pipeline - 1) if shared and stage != rank // parallel.data]
    rounds = train.micro_batches_per_update // parallel.data
    peers.pretend(rank, pipeline * parallel.data, parallel.data, rounds, others, pipeline - 1)
    lptransformer.initialize  # noqa: B018  torch and deepspeed are imported outside of the fake mode
    broken, reports, device.TIME.op_seconds, peers.Message.late = None, list[Any](), op_seconds, late
    with device.fake_gpu():
        try:
            engine = lptransformer.initialize(config, force=True)
            for update in range(updates):
                device.LOG.recording = update == updates - 1
                reports = [report.to_dict() for report in engine.train_batch().reports]
            device.LOG.recording = False
            if engine.world.size == 1:
                for name in engine.valid:
                    engine.eval_batch(name)
                engine.save_checkpoint(run)
                engine.load_checkpoint(run)
                engine.train_batch()
        except Exception as error:
            traceback.print_exc()
            broken = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
            mixed = any(text in str(error) for text in TWO_DEVICES)
            broken = f"tensors of two devices meet: {broken}" if mixed else broken
        device.LOG.recording = False
    found = {"broken": broken, "backend": device.BACKENDS["world"], "events": device.LOG.rows()}
    return {**found, "reports": reports}


def of_case(arguments: list[str]) -> dict[str, Any]:
    """What is observed of a run with these arguments."""
    args, overrides = parser().parse_known_args(arguments)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs a lot
        source: Any = args.config
        if source is None:
            text = Path(folder, "text.txt")
            text.write_text("All that is here is read by nobody: a FakeTensor has no values. " * 50)
            valid = Path(folder, "valid.txt")
            valid.write_text("Some windows, and a part of one. " * 5)
            data = {"train": str(text), "valid": str(valid), "cache": folder}
            source = {**SMALL, "data": {**SMALL["data"], **data}}
        return observed(source, overrides, args.rank, args.updates, Path(folder, "run"), args.op_seconds, args.late)


def of_cases(file: Path) -> list[dict[str, Any]]:
    """Of each; what is imported is imported once."""
    import device  # noqa: F401
    import peers  # noqa: F401

    import lptransformer.training.build  # noqa: F401

    found = []
    for arguments in json.loads(file.read_text()):
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            with os.fdopen(writer, "w") as pipe:
                json.dump(of_case(arguments), pipe)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        found.append(json.loads(answer) if answer else {"broken": "the process ended", "backend": "none", "events": []})
        print(f"{' '.join(arguments)}: {found[-1]['broken'] or 'whole'}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> int:
    args, _ = parser().parse_known_args(arguments)
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout, whatever is installed
    if args.cases:
        several = of_cases(Path(args.cases))
        if args.json:
            Path(args.json).write_text(json.dumps(several, indent=1))
        return int(any(one["broken"] is not None for one in several))
    found = of_case(sys.argv[1:] if arguments is None else arguments)
    print(f"one update of process {args.rank}; its replicas talk over {found['backend']}")
    for row in found["events"]:
        moved = f" ({row['bytes']} bytes)" if row["bytes"] else ""
        print(f"{row['count']:4d} x {row['kind']}: {row['what']}{moved} | {row['where']}")
    count = {kind: sum(row["count"] for row in found["events"] if row["kind"] == kind) for kind in ("sync", "copy")}
    blocking = sum(row["count"] for row in found["events"] if row["what"].endswith(", blocking"))
    print(
        f"{count['sync']} synchronisations, {blocking} of {count['copy']} copies blocking; {found['broken'] or 'whole'}"
    )
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))
    return int(found["broken"] is not None)


if __name__ == "__main__":
    raise SystemExit(main())
