"""What a run runs on: devices, processes, Slurm, compiled layers, memory forecasts, and a watch for processes that hang."""
