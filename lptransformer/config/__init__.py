"""The configuration: its keys and defaults, reading and printing, the checks between keys."""
