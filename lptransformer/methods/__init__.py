"""Which loss trains what, as plain data: objectives, stages, gradients, schedules, FLOPs, heads, codecs; no torch."""
