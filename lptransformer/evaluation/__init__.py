"""A trained model: perplexity of its exits, export, diagnosis."""
