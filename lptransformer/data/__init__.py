"""From text to micro-batches: readers, tokenizers, token sets, the order of training."""
