"""Flow - one piece of a stage's work on the node that takes it, under the profiles process-pool and kubernetes."""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger

from tasks.execution.remote import run_request


@flow(name="stage-work", persist_result=False)
def stage_work(request: str, token: str, rank: int = 0) -> None:
    """Do what a run has written down in the store. Started by runs, not by people.

    Args:
        request: Path of the request in the shared store.
        token: Proof that the store of this node is that of the run.
        rank: Number of this node among those that work together.
    """
    run_request(Path(request), token, rank, get_run_logger().info)
