"""Metrics of samples and of sets of samples: distances, diversity, confidence intervals."""
