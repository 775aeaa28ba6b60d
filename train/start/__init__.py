"""What a run starts from: its name, its source, grown or not, its stages, and what is checked before step 1."""
