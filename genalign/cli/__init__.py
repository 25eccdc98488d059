"""The commands of ``genalign``: each takes what it needs of pipelines and rewards from ``genalign.cli.main``."""
