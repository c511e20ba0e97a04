"""Flows - what a run shows of itself: its history, tables, figures and page."""
