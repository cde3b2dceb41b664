"""Actions on DeepSpeed engines: stages at work, messages between pipeline ranks, clipping, copies of weights."""
