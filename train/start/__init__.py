"""The start of a run: its name, its source, grown or not, its stages, and the checks before step 1."""
