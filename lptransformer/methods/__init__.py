"""Which loss trains what, as plain data: objectives, stages, gradient flow, schedules, FLOPs, heads, codecs. No torch."""
