"""Models by name: OWNER/NAME is fetched from the Hugging Face Hub into the cache of huggingface_hub, once per host.

A process, and those that it starts here or on other hosts, keep to one commit of a name: the first look-up leaves it in
an environment variable, and what is in the cache at that commit is taken from there without asking the hub again.

Only what is read is fetched: configuration, tokenizer, weights as safetensors. Never code, never pickles.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lptransformer.errors import ModelError

COMMITS_VARIABLE = "LPTRANSFORMER_HUB_COMMITS"  # JSON, {OWNER/NAME: commit}
WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
BESIDE_WEIGHTS = ["config.json", "generation_config.json", INDEX, ADAPTER]
BESIDE_WEIGHTS += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
BESIDE_WEIGHTS += ["vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "byte_maps.json"]
BESIDE_WEIGHTS += ["chat_template.json", "chat_template.jinja"]
KEPT_EXITS = "exits.safetensors"  # models/exits.py
_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_name(text: str | Path) -> bool:
    """Whether it is OWNER/NAME and no path that exists."""
    return _NAME.fullmatch(str(text)) is not None and not Path(text).exists()


def folder(name: str | Path, at: str, *, weights: bool = False) -> Path:
    """The folder of a model: a path as it is; of a name its folder in the cache, fetched where it is not there.

    With `weights` the safetensors too. `at` says in messages which value it is. Raises ModelError: the hub cannot be
    reached and the cache does not have it, has no such model, does not let this user read it, or has no safetensors.
    """
    if not is_name(name):
        return Path(name)
    found = _fetched(str(name), at, BESIDE_WEIGHTS)
    if not weights:
        return found
    refuse_adapter(found, at)
    files = _shards(found / INDEX, at) if (found / INDEX).is_file() else [WEIGHTS]
    found = _fetched(str(name), at, [*BESIDE_WEIGHTS, *files, KEPT_EXITS], say=True)
    if not any((found / file).is_file() for file in files):
        raise ModelError(
            f"{at}: on the hub it has no {WEIGHTS} (nor {INDEX}), and weights in another format are not fetched: "
            "convert them, and give the folder"
        )
    return found


def commits() -> dict[str, str]:
    """The commits that this process, and those before it, found for names."""
    found: dict[str, str] = json.loads(os.environ.get(COMMITS_VARIABLE, "{}"))
    return found


def keep_to(found: Mapping[str, str]) -> None:
    """Take these commits from now on, in this process and in those that it starts."""
    if found:
        os.environ[COMMITS_VARIABLE] = json.dumps({**commits(), **found})


def refuse_adapter(path: Path, at: str) -> None:
    """Raises ModelError for a folder that holds an adapter and no model."""
    if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
        raise ModelError(
            f"{at}: that is an adapter ({ADAPTER}) without the model that it belongs to: merge it into that one first "
            "(merge_and_unload of peft), and give the merged model's folder"
        )


def names_code(path: Path) -> bool:
    """Whether config.json or tokenizer_config.json names classes in the folder's own code, which is never run."""
    try:
        return "auto_map" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def check_weights(path: Path, at: str) -> None:
    """Raises ModelError where the files that hold the weights of a model folder, as its index has them, are not there
    or would be read from elsewhere."""
    refuse_adapter(path, at)
    found = next((name for name in (WEIGHTS, INDEX, *PICKLED) if (path / name).is_file()), WEIGHTS)
    if not found.endswith(".json"):
        return  # one file; where it is missing the library says so
    if missing := [name for name in _shards(path / found, at) if not (path / name).is_file()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelError(f"{at}: its weights are not complete: {found} names {missing[0]}{more}, which is not there")


def _shards(index: Path, at: str) -> list[str]:
    """The files that an index of weights names, relative to its folder."""
    try:
        content = json.loads(index.read_bytes())
        content["metadata"]  # the library wants it
        names = sorted(set(content["weight_map"].values()))
        outside = [name for name in names if os.path.isabs(name) or os.path.normpath(name).startswith("..")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"{at}: {index} is no index of weights ({what})") from None
    if outside:
        raise ModelError(f"{at}: {index} names {outside[0]}, which is outside of the folder")
    return names


def _fetched(name: str, at: str, patterns: list[str], say: bool = False) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # what goes wrong is said below, once
    commit = commits().get(name)
    try:
        bar = None if say and sys.stderr.isatty() else _silent()  # None: the library's
        which: dict[str, Any] = {"revision": commit, "allow_patterns": patterns, "ignore_patterns": "*/*"}
        found = Path(snapshot_download(name, **which, tqdm_class=bar))
    except Exception as error:  # the library, its network stack and the disk raise many types
        why = _why(error, name, constants.ENDPOINT, constants.HF_HUB_CACHE)
        raise ModelError(f"{at}: no such folder here, and {why}") from None
    keep_to({name: found.name})
    return found


def _silent() -> type:
    """A bar that is none: the weights of a large model get one, small files do not."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Silent


def _why(error: Exception, name: str, endpoint: str, cache: str) -> str:
    from huggingface_hub import errors

    login = "`hf auth login`, or HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{endpoint} gives it to those alone who were granted access: ask at {endpoint}/{name}, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{endpoint} has no model of that name (or a private one: {login})"
    cause = error.__cause__ or error
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set and the cache {cache} does not hold it whole: fetch it first, or give a folder"
    text = (str(cause).strip().splitlines() or [""])[0]
    return f"it cannot be fetched from {endpoint} ({type(cause).__name__}: {text}): give a folder instead"
