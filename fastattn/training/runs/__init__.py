"""A run: its starting point, the loop over steps with optimizer and logs, its checkpoints, and loading it again."""
