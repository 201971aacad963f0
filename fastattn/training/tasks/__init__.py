"""What a model can learn, one file a task: its data, its batches, its model and its scores."""
