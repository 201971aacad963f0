"""Training and evaluation of the models in fastattn.models; imports nothing until asked."""
