"""From a Hugging Face model to stages: its parts, the heads and their losses, the blueprint of a run."""
