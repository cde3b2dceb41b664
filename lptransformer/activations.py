"""What autograd keeps of a micro-batch, counted from an empty model: nothing is allocated, nothing is computed.

The library's own forward of one block runs on tensors without contents, and every storage that a backward pass would
need is counted once. Attention is torch's fused one: no scores of [T, T].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from lptransformer import family
from lptransformer.family import Anatomy
from lptransformer.memory import BYTES, ActivationBytes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def count(
    config: Any, parts: Anatomy, *, micro_batch_size: int, sequence_length: int, chunk_tokens: int, dtype: str
) -> ActivationBytes:
    """Bytes of one micro-batch of a model with this Hugging Face configuration, in the training dtype.

    Grouped key and value heads are kept as they are, not expanded; without contents the library expands them.
    """
    tokens, size = micro_batch_size * sequence_length, BYTES[dtype]
    before = torch.get_default_dtype()
    torch.set_default_dtype(_DTYPES[dtype])
    try:
        with FakeTensorMode():
            model = family.model_class(config)(config)
            norm = model.get_submodule(parts.norm)
            family.strip(model, parts, range(1), embedding=False, final=False)
            base = model.get_submodule(parts.base)
            hidden = torch.empty(micro_batch_size, sequence_length, parts.hidden_size).requires_grad_()
            of_norm = _kept(norm, lambda: norm(hidden), sequence_length)
            of_block = _kept(base, lambda: base(inputs_embeds=hidden, use_cache=False), sequence_length)
    finally:
        torch.set_default_dtype(before)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or parts.hidden_size // heads
    of_block -= 2 * tokens * (heads - groups) * head_size * size
    rows = min(chunk_tokens, tokens)
    # Logits, their log-softmax, the gradient of the loss and that of the log-softmax, in fp32 or more; with bf16 also
    # the logits and their gradient as they are multiplied (loss.py).
    of_logit = 4 * max(size, 4) + (2 * size if size < 4 else 0)
    return ActivationBytes(
        block=of_block,
        norm=of_norm,
        rows=tokens * parts.hidden_size * size,
        logits=rows * parts.vocab_size * of_logit,
        readout_weight=size,
    )


def _kept(module: nn.Module, forward: Any, sequence_length: int) -> int:
    """Bytes of the storages that `forward` saves for a backward pass, weights and attention masks left out."""
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Only in here a mask is written out: the library asks the contents of tensors whether it needs one.
        mask = tensor.dim() == 4 and tensor.shape[1] == 1 and tensor.shape[2:] == (sequence_length, sequence_length)
        if storage._cdata not in own and not mask:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
        del output
    return sum(storage.nbytes() for storage in storages.values())
