"""Measuring models: paired evaluations with intervals, GenEval, comparisons and reports."""
