"""A run: what it starts from, the loop over steps with its optimizer and logs, and how it is loaded again."""
