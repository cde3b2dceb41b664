"""Loads guard.cpp before torch is imported; builds it once."""

from __future__ import annotations

import ctypes
import getpass
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
NO_COMPILER = "guard.cpp needs g++, and there is none: a CPU build of torch has no device guard for cuda"
CUDA_BUILD = "torch is a CUDA build, which asks its driver: a fake GPU needs a CPU build of torch"


def torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise SystemExit("torch is not installed")
    return Path(found.origin).parent


def hindrance() -> str | None:
    """Why there can be no guard here, or None."""
    if list((torch_folder() / "lib").glob("libtorch_cuda.*")):
        return CUDA_BUILD
    return None if shutil.which("g++") else NO_COMPILER


def built() -> Path:
    """The compiled guard, in a folder for temporary files; compiled again when the source or torch has changed."""
    torch = torch_folder()
    content = hashlib.sha256(SOURCE.read_bytes() + (torch / "version.py").read_bytes() + str(torch).encode())
    folder = Path(tempfile.gettempdir()) / f"lptransformer-fake-cuda-{getpass.getuser()}"
    library = folder / f"guard-{content.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(mode=0o700, exist_ok=True)
    unfinished = folder / f"{library.name}.{os.getpid()}"
    command = ["g++", "-shared", "-fPIC", "-std=c++20", "-O0", str(SOURCE), "-o", str(unfinished)]
    command += [f"-I{torch / 'include'}", f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch / 'lib'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"guard.cpp does not compile against torch in {torch}:\n{done.stderr}")
    unfinished.replace(library)  # whole or not there, even where another process builds it too
    return library


def load() -> None:
    """Register the guard. torch asks for the hooks of a device when it is imported, so this has to come first."""
    assert "torch" not in sys.modules, "the guard has to be loaded before torch"
    if why := hindrance():
        raise SystemExit(why)
    ctypes.CDLL(str(built()), mode=ctypes.RTLD_GLOBAL)
