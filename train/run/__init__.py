"""The products of a run: its folder, checkpoints, log, trackers, samples, and the model that it exports."""
