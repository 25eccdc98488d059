"""Search for users' own diffusers pipelines, which stay unchanged."""
