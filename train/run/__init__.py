"""What a run keeps and tells: its folder, checkpoints, log, trackers, samples, and the model that it exports."""
