"""Diffusion and flow mathematics: paths, transition kernels, rollouts, and the trained policy."""
