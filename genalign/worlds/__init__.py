"""Procedural worlds with exact verifiers: small, but true."""
