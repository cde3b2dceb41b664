"""Pieces of a causal LM: some of its blocks, with or without the embedding and the head, new or from a model folder.

A piece is the base model of the family (models/hf_parts.py) in which everything that is not wanted was replaced before
its weights were made or read, so that only the owned tensors ever exist.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lptransformer import hub
from lptransformer.errors import ModelError
from lptransformer.models import hf_config, hf_parts, router_loss
from lptransformer.models.cross_entropy import LogitRule
from lptransformer.models.head import Head, Readout
from lptransformer.models.hf_parts import Anatomy
from lptransformer.models.router_loss import RouterLoss
from lptransformer.models.seeds import unit_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING = "embedding"
FINAL = "final"


@dataclass
class Piece:
    """The owned parts of a model. `base` runs the embedding and blocks; what stands behind those is an identity there.

    With the final norm and readout: `norm` (an identity where the family has none), `projection` where it has one.
    """

    base: nn.Module
    norm: nn.Module | None
    readout: nn.Linear | None
    projection: nn.Linear | None = None
    router_loss: RouterLoss | None = None

    def head(self, chunk_tokens: int, rule: LogitRule) -> Head:
        """The model's own head, of a piece that has it."""
        assert self.norm is not None and self.readout is not None
        return Head(self.norm, Readout.of(self.readout, chunk_tokens, rule), down=self.projection)


def _piece_class(config: Any, parts: Anatomy, blocks: range, embedding: bool, final: bool) -> type[PreTrainedModel]:
    base_class = hf_config.model_class(config)

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        base_class.__init__(self, config, *args, **kwargs)
        hf_parts.strip(self, parts, blocks, embedding, final)

    # The library finds key conversions and tied weights by the class's name and module: keep both.
    return type(base_class.__name__, (base_class,), {"__init__": __init__, "__module__": base_class.__module__})


def _finish(model: PreTrainedModel, parts: Anatomy, final: bool) -> Piece:
    norm, projection = (None if name is None else model.get_submodule(name) for name in (parts.norm, parts.projection))
    readout = model.get_submodule(parts.lm_head)
    for name in parts.final[:-1]:
        model.set_submodule(name, nn.Identity())
    router = router_loss.of(model)
    if not final:
        return Piece(model.base_model, None, None, router_loss=router)
    assert isinstance(readout, nn.Linear) and (projection is None or isinstance(projection, nn.Linear))
    return Piece(model.base_model, nn.Identity() if norm is None else norm, readout, projection, router)


@contextlib.contextmanager
def _seeded(seed: int, unit: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(unit_seed(seed, unit))
        yield


def _allocate(config: Any, parts: Anatomy, blocks: range, embedding: bool, final: bool) -> PreTrainedModel:
    """The owned parts in fp32 on the CPU: buffers (rotary frequencies) ready, weights not yet set.

    Under `torch.device("meta")` nothing is allocated: shapes only.
    """
    model = hf_config.empty_model(_piece_class(config, parts, blocks, embedding, final), config)
    if torch.get_default_device().type != "meta":
        hf_parts.fill(model)
    return model.train()


def new_piece(config: Any, parts: Anatomy, blocks: range, embedding: bool, final: bool, seed: int | None) -> Piece:
    """The owned parts of a new model, fp32 on the CPU, initialised as the family does, each unit from its own seed.

    With `seed` None the weights hold whatever was in memory: the caller fills them in.
    """
    model = _allocate(config, parts, blocks, embedding, final)
    if seed is None:
        return _finish(model, parts, final)
    units = {f"block {index}": [f"{parts.blocks}.{index}"] for index in blocks}
    if embedding:
        units[EMBEDDING] = list(parts.before)
    if final:
        units[FINAL] = parts.final
    for unit, names in units.items():
        with _seeded(seed, unit):
            for name in names:
                model.get_submodule(name).apply(model._init_weights)
    return _finish(model, parts, final)


@dataclass
class HeadMaker:
    """What an auxiliary head is made of: `norm`, of the class of the model's own, and linear maps to the vocabulary."""

    norm: nn.Module
    _model: PreTrainedModel
    _parts: Anatomy
    _block: int
    _seed: int | None

    def linear(self, *shapes: tuple[int, int]) -> list[nn.Linear]:
        """New maps [in, out], initialised as the family does, one after another from the head's seed.

        A whole readout is of the class of the model's own; those to the vocabulary have a bias where that has one.
        Called once. Without a seed the caller fills them in.
        """
        made = [self._empty(*shape) for shape in shapes]
        assert len({id(linear) for linear in made}) == len(made), "two whole readouts of one head would be one"
        if self._seed is not None:
            with _seeded(self._seed, f"head {self._block}"):
                for linear in made:
                    linear.apply(self._model._init_weights)
        return made

    def _empty(self, width: int, out: int) -> nn.Linear:
        if (width, out) == (self._parts.readout_width, self._parts.vocab_size):
            readout = self._model.get_submodule(self._parts.lm_head)
            assert isinstance(readout, nn.Linear)
            return readout
        bias = self._parts.head_bias and out == self._parts.vocab_size
        return nn.utils.skip_init(nn.Linear, width, out, bias=bias, device=torch.get_default_device())


def new_head(config: Any, parts: Anatomy, block: int, seed: int | None) -> HeadMaker:
    """The parts of an auxiliary head after `block`; with `seed` None the caller fills in the weights."""
    model = _allocate(config, parts, range(0), False, True)
    norm = nn.Identity() if parts.norm is None else model.get_submodule(parts.norm)
    if seed is not None:
        with _seeded(seed, f"head {block}"):
            norm.apply(model._init_weights)
    return HeadMaker(norm, model, parts, block, seed)


def new_head_blocks(config: Any, parts: Anatomy, block: int, like: range, seed: int | None) -> nn.Module:
    """Blocks of the sizes and kinds of the blocks `like`, for the auxiliary head after `block`: a base model.

    New weights, each block with a seed of its own; with `seed` None the caller fills them in.
    """
    model = _allocate(config, parts, like, False, False)
    if seed is not None:
        for number, index in enumerate(like):
            with _seeded(seed, f"head {block} block {number}"):
                model.get_submodule(f"{parts.blocks}.{index}").apply(model._init_weights)
    return _finish(model, parts, False).base


def named_modules(piece: Piece, parts: Anatomy) -> dict[str, nn.Module]:
    """The modules of a piece by their names in the whole model."""
    named = {parts.base: piece.base, parts.norm: piece.norm, parts.projection: piece.projection}
    named[parts.lm_head] = piece.readout
    return {name: module for name, module in named.items() if name is not None and module is not None}


def copied_piece(
    weights: Mapping[str, Tensor], config: Any, parts: Anatomy, blocks: range, embedding: bool, final: bool
) -> Piece:
    """The owned parts, fp32 on the CPU, with copies of what a whole model's `state_dict()` has for them."""
    piece = new_piece(config, parts, blocks, embedding, final, None)
    for below, module in named_modules(piece, parts).items():
        module.load_state_dict({name: weights[f"{below}.{name}"] for name in module.state_dict()})
    return piece


def load_piece(folder: str | Path, config: Any, parts: Anatomy, blocks: range, embedding: bool, final: bool) -> Piece:
    """The owned parts of a model folder, fp32 on the CPU. Only the owned tensors are read.

    A tied readout is read as a copy of the embedding, or the embedding from the readout, whichever the folder holds.
    Weights that are pickled are read with `weights_only`, which executes nothing. Raises ModelError when a file or a
    tensor is missing, truncated or of another shape, and when the folder has blocks that its configuration does not
    count.
    """
    where = f"the model in {folder}"
    hub.check_weights(Path(folder), where)
    tied = (embedding or final) and config.tie_word_embeddings
    as_stored = copy.deepcopy(config)
    as_stored.tie_word_embeddings = tied
    piece_class = _piece_class(config, parts, blocks, embedding or tied, final or tied)
    try:
        with hf_config.quiet_transformers(), warnings.catch_warnings(action="ignore"):
            model, loading = piece_class.from_pretrained(
                folder,
                config=as_stored,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
                local_files_only=True,
            )
    except UnpicklingError:
        raise ModelError(
            f"{where}: its weights are pickled and hold more than tensors, or are damaged: nothing in them is "
            "executed, so they are not read; where you trust them, save them as safetensors"
        ) from None
    except Exception as error:  # safetensors and the library raise many types for a damaged file
        what = _damaged_file(Path(folder)) or hf_config.one_line(error)
        raise ModelError(f"{where}: the weights cannot be read: {what}") from None
    _check_loaded(loading, len(model.get_submodule(parts.blocks)), parts, where)
    piece = _finish(model.train(), parts, final)
    if tied and not embedding:
        hf_parts.drop_embedding(model, parts)
    elif tied and piece.readout is not None:
        piece.readout.weight = nn.Parameter(piece.readout.weight.detach().clone())
    return piece


def _check_loaded(loading: dict[str, Any], depth: int, parts: Anatomy, where: str) -> None:
    """Raise ModelError when tensors were missing, of another shape, or of blocks that the model does not have."""
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(f"{where}: its weights are not complete: there is no {_some(missing)}")
    if wrong := [f"{name} {tuple(stored)}, not {tuple(right)}" for name, stored, right in loading["mismatched_keys"]]:
        raise ModelError(f"{where}: its weights do not fit its config.json: there is {_some(sorted(wrong))}")
    in_block = re.compile(rf"(?:^|\.){parts.blocks.rpartition('.')[2]}\.(\d+)\.")
    found = [in_block.search(key) for key in loading["unexpected_keys"]]
    if extra := sorted(match.string for match in found if match and int(match[1]) >= depth):
        raise ModelError(f"{where}: its config.json says {depth} blocks, but there is also {_some(extra)}")


def _some(names: list[str]) -> str:
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _damaged_file(folder: Path) -> str | None:
    """The first file of the folder that is no whole safetensors file, and why; the library's errors do not name it."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is damaged or truncated ({error})"
    return None
