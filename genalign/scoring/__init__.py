"""Calling rewards: scores, combinations, the NFE ledger, reward servers and the reward check."""
