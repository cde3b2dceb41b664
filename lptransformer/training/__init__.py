"""The story of a run, from the command line to the last checkpoint, and what a person sees of it."""
