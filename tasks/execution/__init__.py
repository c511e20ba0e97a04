"""Tasks - where a stage's work runs: this machine, a Prefect work pool, Ray or Slurm. Never part of a key."""
