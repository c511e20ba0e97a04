"""Flow - compare: the variants of a comparison, one after the other on one store, and one table.

Resumable like any run: call it again.
"""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from data_contracts.config import parse
from data_contracts.store import Store
from flows.comparison import load_comparison, outcomes, text
from flows.comparison_page import write_report
from flows.config import RunConfig
from flows.run import run_self_play


@flow(name="variant", flow_run_name="{name}", persist_result=False)
def variant(name: str, settings: dict[str, Any], store: str) -> None:
    """One variant with one seed: a whole self-play run."""
    run_self_play(parse(RunConfig, settings, name), Store(store))


@flow(name="compare", flow_run_name="{config}", persist_result=False)
def compare(
    config: str, overrides: dict[str, Any] | None = None, store: str | None = None, size: str | None = None
) -> dict[str, Any]:
    """Run every variant and seed of a comparison; what they share is built once.

    Args:
        config: Path of the comparison, e.g. deploy/runs/compare/table3.yaml.
        overrides: Settings of the runs by dotted name, laid over all variants, e.g. {"training.learning_rate": 1e-6}.
        store: Directory of the artifact store; default SELFPLAY_STORE, else ./store.
        size: A name of the comparison's `sizes`, e.g. gpu.
    """
    root = Store(store)
    comparison = load_comparison(config, overrides, size)
    comparison.check(root)
    for item in comparison.variants:
        variant(item.config.name, item.config.model_dump(mode="json"), str(root.root))
    results = outcomes(comparison, root)
    report = write_report(comparison, results, root)
    words = text(comparison, results)
    try:
        create_markdown_artifact(f"{words}\n\nPage: `{report}`", key=f"{comparison.config.name}-comparison")
    except Exception as error:  # a server that went away costs the picture, not the comparison
        get_run_logger().warning("the comparison could not be sent to Prefect: %s", error)
    return {"text": words, "report": str(report)}
