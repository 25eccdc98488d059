"""The training loop: sampler, trainer, runs on disk, resume, and reactions to reward hacking and failures."""
