"""Stages - the verbs: sample, score, weigh, train, evaluate.

Each runs as a process of its own: `python -m stages <verb> SPEC.json`.
"""
