"""Benchmarks: a suite of tasks, scored by lm-evaluation-harness on a network in memory."""
