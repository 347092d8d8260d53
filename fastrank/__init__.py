"""Ranking losses for aligning language models."""
