"""The tasks that a model can learn, one file per task: its data, its batches, its model and its scores."""
