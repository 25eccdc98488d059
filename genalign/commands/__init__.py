"""The commands of ``genalign``: here the core, the pipelines and the rewards are put together."""
