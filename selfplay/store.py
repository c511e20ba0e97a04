"""The store: what runs have made, and its rows."""

from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.shards import SCHEMAS, read_shards
from data_contracts.store import Store

__all__ = ["SCHEMAS", "ArtifactRecord", "ArtifactRef", "Store", "read_shards"]
