"""Contracts - the nouns: prompts, generations, scored_pairs, weighted_pairs, checkpoint, eval_report.

No torch, no prefect.
"""
