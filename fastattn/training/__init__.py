"""Training and evaluation of the models in fastattn.models. Importing this package loads none of its modules."""
