"""The contenders of benchmarks/throughput.py: one module per peer, each building a model in training from the same
stages (lptransformer.models.stage), data, optimizer and clipping. face.py says what they take and give."""
