"""Learned growth: what a fixed operator has written is fitted on text, before the folder is complete.

The engine below it knows nothing of it, and imports no torch: a plan says that it is learned (`lessons.py`),
`growth.grow` calls `learn` between writing and verifying.
"""
