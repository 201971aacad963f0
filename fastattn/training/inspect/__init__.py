"""The outputs of a model: generated text, scores of predictions, attention maps, and figures of them."""
