"""Benchmarks: each writes its tables under ``results/`` with the machine, the versions and the date."""
