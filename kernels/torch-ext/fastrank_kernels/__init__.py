"""Ranking losses over shared prompts: tensors in, tensors out."""
