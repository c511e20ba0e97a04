"""Tasks - where a stage's work runs: this machine, a Prefect work pool, Ray or Slurm. Nothing here enters an artifact's key."""
