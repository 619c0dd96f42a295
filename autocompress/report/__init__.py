"""Reads a run directory and shows it to people: figures, tables, one self-contained page."""
