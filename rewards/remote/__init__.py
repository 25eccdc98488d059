"""Rewards that another process or machine computes: the client of ``genalign serve`` and vision-language judges."""

from rewards.remote.remote_reward import RemoteReward as RemoteReward
