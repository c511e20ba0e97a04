"""Types of rows: what a type checker holds stages to is what a shard holds."""

import pytest

from data_contracts.prompts import PromptRow
from data_contracts.rows import GenerationRow, ScoredPairRow, WeightedPairRow
from data_contracts.shards import SCHEMAS


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (PromptRow, "prompts"),
        (GenerationRow, "generations"),
        (ScoredPairRow, "scored_pairs"),
        (WeightedPairRow, "weighted_pairs"),
    ],
)
def test_the_type_of_a_row_has_the_columns_of_its_kind(row, kind):
    schema = SCHEMAS[kind]
    assert set(row.__annotations__) == set(schema.names)
    nullable = {name for name, annotation in row.__annotations__.items() if "None" in str(annotation)}
    assert nullable == {field.name for field in schema if field.nullable}
