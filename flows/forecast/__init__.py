"""Flows - a run before it is made: played on paper, measured against memory, priced."""
