"""Rewards learned from data: preferences of people who differ."""
