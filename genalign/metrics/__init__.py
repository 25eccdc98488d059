"""Statistics of samples and of sets of samples: distances, diversity, intervals."""
