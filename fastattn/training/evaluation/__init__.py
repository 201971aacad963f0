"""How good a trained model is: the scores of a run, its report, runs side by side, a baseline."""
