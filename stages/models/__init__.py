"""Stages - language models and their tokens: loading, attention kernels, log-probs, the shared maths."""
