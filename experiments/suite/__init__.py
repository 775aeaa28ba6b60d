"""Benchmarks of finished runs and checkpoints, beside published ones."""
