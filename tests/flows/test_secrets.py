"""Nothing secret leaves the environment: not in a record, a row, a log, MLflow's or Prefect's database, or a report."""

from data_contracts.shards import SCHEMAS, read_shard


def test_tokens_of_the_environment_are_nowhere_in_what_a_run_writes_or_says(undisturbed, planted):
    secrets = [value.encode() for value in planted.values()]
    files = [path for path in undisturbed.store.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"record.json", "stage.log", "spec.json", "mlflow.db", "report.md", "report.html"} <= names and len(
        files
    ) > 50
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".parquet":  # compressed
            kind = next(
                kind for kind in (path.name.split("-")[0], path.parent.parent.name, "token_logps") if kind in SCHEMAS
            )
            data += repr(read_shard(path, kind).to_pylist()).encode()
        assert not [secret for secret in secrets if secret in data], path
    assert not [value for value in planted.values() if value in undisturbed.first.out]
