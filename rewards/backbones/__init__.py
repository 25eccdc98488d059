"""Networks and data that rewards are made of: encoders, detectors, weight files, reference sets."""
