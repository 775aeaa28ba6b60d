"""The machine: devices, processes, Slurm, compiled layers, memory forecasts, a watch over hanging
processes."""
