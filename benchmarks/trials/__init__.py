"""Trials of every printed bound against truths computed by other means: see ``benchmarks/soundness.py``."""
