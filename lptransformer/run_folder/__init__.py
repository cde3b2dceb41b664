"""What a run leaves on disk: the layout of its folder, checkpoints, metrics, traces, the plot of its losses."""
