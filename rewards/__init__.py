"""Scorers of samples: higher is better, NaN where a sample could not be scored."""
