"""Stages - how a stage's processes live: shards shared by workers, costs, rendezvous, supervision."""
