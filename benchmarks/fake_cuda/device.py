"""A CUDA device that is not there: torch.cuda mocked, FakeTensors for its memory, and a log of the work for the GPU.

What the main thread does is logged, each with where in lptransformer, deepspeed or transformers it comes from:

    sync         the host waits for the device: the value of a tensor is read, a stream or the device is synchronised
    copy         between host and device; `blocking` where the host waits for it
    collective   of torch.distributed, with the backend that was asked for, the device of the tensor and its bytes
    message      sent or received over a channel between pipeline ranks (peers.py), with backend, device and bytes

A FakeTensor has no values. Where a program reads one it gets 1, or 0 where it asks whether something is not finite.

The device takes `TIME.op_seconds` for every operation that it is given, one after another, on all streams; events say
when it would have come so far, and who waits for it waits as long.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import guard

guard.load()
os.environ["DS_ACCELERATOR"] = "cuda"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from lptransformer.engine import deepspeed_stage, transfers  # noqa: E402
from lptransformer.models import family_check  # noqa: E402
from lptransformer.run_folder import saved_stage  # noqa: E402

LIBRARIES = ("lptransformer", "deepspeed", "transformers")
WRAPPERS = ("deepspeed/comm/", "deepspeed/utils/nvtx.py", "deepspeed/accelerator/")  # in between, and of no interest
DEVICE = torch.device("cuda", 0)
READS: dict[str, Any] = {"item": 1.0, "__bool__": True, "__float__": 1.0, "__int__": 1, "__index__": 1, "tolist": None}
ASKS_FOR_INFINITIES = ("overflow", "inf", "nan", "invalid")


@dataclass
class DeviceTime:
    """When the device is done with what it was given, by perf_counter."""

    op_seconds: float = 0.0
    done: float = 0.0

    def work(self) -> None:
        self.done = self.now() + self.op_seconds

    def now(self) -> float:
        """When what is given now begins."""
        return max(self.done, time.perf_counter())

    def wait(self) -> None:
        time.sleep(max(0.0, self.done - time.perf_counter()))


@dataclass
class Log:
    """Events by (kind, what, where), and the bytes that were moved, while `recording`. Of a helper thread (`muted`)
    nothing is logged, and it takes no time."""

    recording: bool = False
    muted: bool = False
    events: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    moved: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def note(self, kind: str, what: str, num_bytes: int = 0) -> None:
        if self.muted:
            return
        if kind == "sync" or what == "cuda to cpu, blocking":
            TIME.wait()
        if self.recording:
            key = (kind, what, where())
            self.events[key] += 1
            self.moved[key] += num_bytes

    def rows(self) -> list[dict[str, Any]]:
        """The events, host synchronisations first, the most frequent first."""
        order = sorted(self.events.items(), key=lambda item: (item[0][0] != "sync", item[0][0], -item[1], item[0]))
        return [
            {"kind": kind, "what": what, "where": place, "count": count, "bytes": self.moved[kind, what, place]}
            for (kind, what, place), count in order
        ]


LOG, TIME = Log(), DeviceTime()
PEAK = Counter[str]()  # "bytes" of the modules that came to the device since its peak was reset: all that is counted
HEADERS: list[list[int]] = []  # of messages that have been waited for (peers.py); a FakeTensor cannot hold them


def where(depth: int = 3) -> str:
    """The innermost calls in the libraries of interest, the innermost first."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(found) < depth:
        parts = frame.f_code.co_filename.split("/")
        library = next((name for name in LIBRARIES if name in parts[:-1]), None)
        if library is not None:
            path = "/".join(parts[len(parts) - 1 - parts[::-1].index(library) :])
            if not path.startswith(WRAPPERS) and not frame.f_code.co_name.startswith("<"):
                found.append(f"{path}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found)


# -------------------------------------------------------------------------------------------------- torch.cuda


class FakeStream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None:
        LOG.note("sync", "stream.synchronize")

    def wait_stream(self, other: FakeStream) -> None: ...

    def wait_event(self, event: FakeEvent) -> None: ...

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent()
        event.record()
        return event

    def query(self) -> bool:
        return True


class FakeEvent:
    def __init__(self, enable_timing: bool = False, **kwargs: Any) -> None:
        self.timed, self.comes = enable_timing, 0.0

    def record(self, *args: Any) -> None:
        self.comes = TIME.now()

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None:
        LOG.note("sync", "event.synchronize")

    def query(self) -> bool:
        return time.perf_counter() >= self.comes

    def elapsed_time(self, other: FakeEvent) -> float:
        """In ms, where both are timed, and have come: else CUDA raises."""
        assert self.timed and other.timed and self.query() and other.query()
        return 1e3 * (other.comes - self.comes)


@dataclass(frozen=True)
class Properties:
    name: str = "a fake GPU"
    major: int = 9
    minor: int = 0
    total_memory: int = 1 << 37
    multi_processor_count: int = 132


def replace(owner: object, **new: Any) -> None:
    """Let names of a module or a class mean something else, for the rest of the process."""
    for name, value in new.items():
        setattr(owner, name, value)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _mock_cuda() -> None:
    stream = FakeStream()
    same: dict[str, Any] = dict.fromkeys(
        ("memory_allocated", "memory_reserved", "max_memory_reserved", "current_device"), 0
    )
    same |= {"is_available": True, "is_initialized": True, "device_count": 1, "is_bf16_supported": True}
    same |= {"get_device_capability": (9, 0), "get_device_name": Properties().name}
    same |= {"get_device_properties": Properties(), "current_stream": stream, "default_stream": stream}
    same |= dict.fromkeys(("set_device", "_lazy_init", "empty_cache", "init"), None)
    replace(torch.cuda, **{name: _always(value) for name, value in same.items()})
    changed: dict[str, Any] = {"Stream": FakeStream, "Event": FakeEvent, "stream": lambda s: contextlib.nullcontext()}
    changed["max_memory_allocated"] = lambda *args: PEAK["bytes"]
    changed["reset_peak_memory_stats"] = lambda *args: PEAK.clear()
    changed["synchronize"] = lambda *args: LOG.note("sync", "torch.cuda.synchronize: all of the device")
    replace(torch.cuda, **changed)
    replace(torch.cuda.nvtx, range_push=lambda *args: 0, range_pop=lambda *args: 0)
    replace(Tensor, record_stream=lambda *args: None)


# -------------------------------------------------------------------------------------------------- collectives


class Done:
    """A collective that has been made."""

    def wait(self, *args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


BACKENDS: dict[str, str] = {"world": "none"}  # what was asked for, where the groups of processes only pretend


def _mock_collectives() -> None:
    tensors = ("all_reduce", "broadcast", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor")
    # DeepSpeed took these names over when it was imported, and looks them up at every call.
    replace(dist, **{name: _collective(name) for name in tensors})
    replace(dist, barrier=lambda *args, **kwargs: LOG.note("collective", f"barrier over {BACKENDS['world']}"))
    replace(dist, get_backend=lambda group=None: BACKENDS["world"])


def _collective(name: str) -> Callable[..., Done | None]:
    def call(*args: Any, **kwargs: Any) -> Done | None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        largest = max(given, key=Tensor.numel)
        what = f"{name} over {BACKENDS['world']} of a {largest.device.type} tensor"
        LOG.note("collective", what, largest.numel() * largest.element_size())
        return Done() if kwargs.get("async_op") else None

    return call


# -------------------------------------------------------------------------------------------------- tensors


def concerns_gpu(values: Any) -> bool:
    """Whether a FakeTensor is among the arguments, or the device."""
    for value in values:
        if isinstance(value, FakeTensor) or (isinstance(value, torch.device) and value.type == "cuda"):
            return True
        if isinstance(value, str) and value.startswith("cuda"):
            return True
        if isinstance(value, list | tuple) and concerns_gpu(value):
            return True
    return False


class Reads(TorchFunctionMode):
    """Reading the value of a tensor on the device is a synchronisation; the value is made up.

    The fake mode is on for what concerns the GPU and off for all else, so that what is on the host is real.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if func is torch.tensor and concerns_gpu(kwargs.values()):
            device = kwargs.pop("device")
            made = func(*args, **kwargs)
            with FAKE:  # a copy from pageable memory, as it is on a GPU
                return FAKE.from_tensor(made).to(device)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if name == "pin_memory":
            return tensor
        if name == "is_pinned":
            return False
        if tensor is not None and name in READS and isinstance(tensor, FakeTensor):
            if tensor.device.type == "cuda":
                LOG.note("sync", f"{name} of a tensor on the device")
            return made_up(tensor, name)
        if not concerns_gpu((*args, *kwargs.values())):
            return func(*args, **kwargs)
        if name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            LOG.note("sync", "a mask, whose size the host asks for")
            args = (tensor, args[1].nonzero(as_tuple=True))  # which is known of a mask of the host
        TIME.work()
        with FAKE:
            if tensor is not None and not isinstance(tensor, FakeTensor) and name != "copy_":
                args = (FAKE.from_tensor(tensor), *args[1:])  # from the host to the device
            return func(*args, **kwargs)


def made_up(tensor: Tensor, name: str) -> Any:
    if name == "tolist":
        from_header = tensor.numel() == 8 and tensor.dtype == torch.int64 and HEADERS
        return HEADERS.pop(0) if from_header else [1.0] * tensor.numel()
    if any(word in where(1).rpartition(" ")[2] for word in ASKS_FOR_INFINITIES):
        return type(READS[name])(0)
    return READS[name]


class Copies(TorchDispatchMode):
    """Copies between host and device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "_to_copy" and isinstance(args[0], Tensor):
            self.note(args[0], out, kwargs.get("non_blocking", False))
        elif name == "copy_":
            self.note(args[1], args[0], args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return out

    def note(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.device.type != target.device.type:
            how = "not blocking" if non_blocking else "blocking"
            what = f"{source.device.type} to {target.device.type}, {how}"
            LOG.note("copy", what, target.numel() * target.element_size())


def _move(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Module.to. A parameter cannot be made fake in place: where it moves or changes, there is a new one instead."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    held = [*module.parameters(), *module.buffers()]
    if (device is None or device.type == "cpu") and not any(isinstance(tensor, FakeTensor) for tensor in held):
        return _real_move(module, *args, **kwargs)

    def moved(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        target = device if device is not None else tensor.device
        if isinstance(tensor, FakeTensor) and (kind, target.type) == (tensor.dtype, tensor.device.type):
            return tensor
        PEAK["bytes"] += tensor.numel() * tensor.element_size()
        LOG.note("copy", f"{tensor.device.type} to {target.type}, blocking", tensor.numel() * tensor.element_size())
        return torch.empty(tensor.shape, dtype=kind, device=target)

    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and (new := moved(parameter)) is not parameter:
                owner._parameters[name] = nn.Parameter(new, requires_grad=parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = moved(buffer)
    return module


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    """The autograd engine works in a thread of its own, with the modes that are on here."""
    with Reads(), FAKE:
        return _real_backward(*args, **kwargs)


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """In here tensors of device cuda are FakeTensors, and what happens to them is logged while LOG.recording."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
    from transformers import masking_utils

    replace(coordinator, assert_ints_same_as_other_ranks=lambda ints: None)  # compares values that are made up
    replace(masking_utils, is_tracing=lambda *args: False)  # the library takes FakeTensors for a compiler at work
    replace(fake_tensor, init_gpu_context=lambda *args: None)  # would make a tensor on the GPU
    replace(nn.Module, to=_move)
    replace(torch.autograd, _engine_run_backward=_run_backward)
    replace(FakeTensor, tolist=lambda tensor: made_up(tensor, "tolist"))
    replace(transfers.HelperThread, begin=_begin)
    replace(deepspeed_stage.TrainedStage, __init__=_trained_stage)
    replace(saved_stage, save_file=_save_file)
    replace(family_check, check=lambda *args, **kwargs: None)  # compares gradients
    with Reads(), Copies():
        yield


def _trained_stage(made: Any, stage: Any, optimizer: torch.optim.Optimizer, *rest: Any, **options: Any) -> None:
    """DeepSpeed moves a stage whose optimizer is there already. Here that makes new parameters, so it comes first."""
    names = {id(parameter): name for name, parameter in stage.named_parameters()}
    moved = dict(stage.to(DEVICE).named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [moved[names[id(parameter)]] for parameter in group["params"]]
    _real_trained_stage(made, stage, optimizer, *rest, **options)


def _save_file(tensors: dict[str, Tensor], *rest: Any) -> None:
    """What a checkpoint holds of a FakeTensor are zeros."""
    _real_save_file({name: torch.zeros(one.shape, dtype=one.dtype) for name, one in tensors.items()}, *rest)


def _begin(thread: transfers.HelperThread, call: Callable[[], Any]) -> transfers.Later[Any]:
    """A call of a helper thread is made at once, because the fake mode is of one thread, and logged as nothing."""
    later, LOG.muted = transfers.Later(call), True
    later.run()
    LOG.muted = False
    return later


FAKE = FakeTensorMode(allow_non_fake_inputs=True)
_real_trained_stage, _real_save_file = deepspeed_stage.TrainedStage.__init__, saved_stage.save_file
_real_move, _real_backward = nn.Module.to, torch.autograd._engine_run_backward
_mock_cuda()
_mock_collectives()
