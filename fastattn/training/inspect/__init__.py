"""What comes out of a model: generated text, scores of predictions, attention maps, and pictures of them."""
