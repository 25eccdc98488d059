"""Processes, files, devices and media: what the other rooms run on."""
