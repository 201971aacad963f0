"""The way from a source to batches: texts and documents, their parts, tokens, windows and rows."""
