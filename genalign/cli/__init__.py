"""The commands of ``genalign``, which get pipelines and rewards from ``genalign.cli.main``."""
