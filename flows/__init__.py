"""Flows - in what order: each reads like the algorithm box of its paper."""
