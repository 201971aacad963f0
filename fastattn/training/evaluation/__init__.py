"""Evaluation of trained models: the scores of a run, its report, comparisons of runs, and a baseline."""
