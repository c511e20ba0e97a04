"""Rows of the public sets, by the names of their columns: what stands in a row of prompts is written here by hand."""

import pytest

from data_contracts.prompts import UnusableRow
from tasks.data.shapes import columns_read, read_row, shape_of

USER = {"role": "user", "content": "Why?"}
EARLIER = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
GOOD, BAD = {"role": "assistant", "content": "Because."}, {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}


def read(**columns):
    """(messages, response, chosen, rejected) of a row with these columns."""
    shape = shape_of(columns)
    assert shape is not None
    row = read_row(shape, columns)
    return row["messages"], row["response"], row["chosen"], row["rejected"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": "Why?"}, ([USER], None, None, None)),
        ({"prompt": "Why?", "system": "Be brief."}, ([SYSTEM, USER], None, None, None)),
        ({"prompt": "Why?", "system": " ", "completion": "Because."}, ([USER], "Because.", None, None)),
        ({"messages": [SYSTEM, USER, GOOD], "system": "Other."}, ([SYSTEM, USER], "Because.", None, None)),
        ({"messages": [*EARLIER, USER]}, ([*EARLIER, USER], None, None, None)),
        ({"prompt": "What?", "messages": [*EARLIER, USER, GOOD]}, ([*EARLIER, USER], "Because.", None, None)),
        ({"prompt": [USER], "completion": [GOOD]}, ([USER], "Because.", None, None)),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ([USER], None, "Because.", "No.")),
        ({"prompt": [USER], "chosen": GOOD, "rejected": BAD}, ([USER], None, "Because.", "No.")),
        ({"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], None, "Because.", "No.")),
        ({"prompt": "Why?", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
         ([SYSTEM, USER], None, "Because.", "No.")),
        ({"prompt": "What?", "chosen": [*EARLIER, USER, GOOD], "rejected": [*EARLIER, USER, BAD]},
         ([*EARLIER, USER], None, "Because.", "No.")),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], None, "Because.", "No.")),
        ({"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No."},
         ([USER], None, "Because.", "No.")),
        ({"chosen": "\n\nHuman: What?\n\nAssistant: That.\n\nHuman: Why?\n\nAssistant: Because.",
          "rejected": "\n\nHuman: What?\n\nAssistant: That.\n\nHuman: Why?\n\nAssistant: No."},
         ([*EARLIER, USER], None, "Because.", "No.")),
        ({"prompt": "Why?", "completion": "Because.", "label": True}, ([USER], None, "Because.", None)),
        ({"prompt": "Why?", "completion": "No.", "label": 0}, ([USER], None, None, "No.")),
        ({"prompt": "Why?", "completion": "No.", "label": "False"}, ([USER], None, None, "No.")),
        ({"prompt": [USER], "completion": [BAD], "label": False}, ([USER], None, None, "No.")),
        ({"messages": [USER, GOOD], "kto_tag": True}, ([USER], None, "Because.", None)),
        ({"messages": [USER, GOOD], "label": "politics"}, ([USER], "Because.", None, None)),
        ({"prompt": "Why?", "response": "Because.", "label": 1}, ([USER], "Because.", None, None)),
        ({"prompt": "Why?", "label": True}, ([USER], None, None, None)),
        ({"prompt": "Why?", "completion": "No.", "label": "no"}, ([USER], None, None, "No.")),
        ({"prompt": "Why?", "response": "Because.", "label": "Yes"}, ([USER], None, "Because.", None)),
        ({"prompt": "Why?", "completion": "No.", "label": 0.0}, ([USER], None, None, "No.")),
        ({"prompt": "Why?", "response": float("nan"), "chosen": float("nan")}, ([USER], None, None, None)),
        ({"prompt": USER, "chosen": GOOD, "rejected": BAD}, ([USER], None, "Because.", "No.")),
        ({"instruction": "Why?", "input": "", "output": "Because."}, ([USER], "Because.", None, None)),
        ({"instruction": "Why?", "chosen": "Because.", "rejected": "No."}, ([USER], None, "Because.", "No.")),
        ({"instruction": " ", "input": "Why?", "output": "Because."}, ([USER], "Because.", None, None)),
        ({"messages": [{"role": "developer", "content": "Be brief."}, USER, GOOD]},
         ([SYSTEM, USER], "Because.", None, None)),
        ({"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That.", "weight": 0},
                       USER, GOOD | {"weight": 1}], "tools": []}, ([*EARLIER, USER], "Because.", None, None)),
        ({"prompt": "Why?", "completion": "No.", "label": "0.0"}, ([USER], None, None, "No.")),
        ({"instruction": "Why?", "history": [["What?", "That."]], "output": "Because.", "system": "Be brief."},
         ([SYSTEM, *EARLIER, USER], "Because.", None, None)),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
         ([USER], "Because.", None, None)),
        ({"real": [USER, GOOD], "generated": [USER, BAD]}, ([USER], "Because.", "Because.", "No.")),
        ({"prompt": "Why?", "response_0": "No.", "response_1": "Because.", "better_response_id": 1},
         ([USER], None, "Because.", "No.")),
    ],
)  # fmt: skip
def test_a_row_of_a_known_shape(columns, expected):
    assert read(**columns) == expected


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"chosen": "Because.", "rejected": "No."}, '"chosen" needs a prompt: name its column, e.g. `columns: '),
        ({"chosen": [USER, GOOD], "rejected": [*EARLIER, USER, BAD]}, "differ before their last turn"),
        ({"real": [USER, GOOD], "generated": [*EARLIER, USER, BAD]}, "differ before their last turn"),
        ({"real": [USER], "generated": [USER]}, "`real` does not end with the assistant's turn"),
        ({"instruction": "Why?", "history": ["What?"]}, "`history` is no list of pairs"),
        ({"messages": [USER, GOOD | {"weight": 0}]}, '"messages" ends with an answer of weight 0'),
        ({"question": "Why?", "chosen": "Because.", "rejected": "No."}, '"chosen" needs a prompt: name its column'),
        ({"prompt": "Why?", "response_0": "a", "response_1": "b", "better_response_id": 2}, "is neither 0 nor 1"),
    ],
)
def test_a_row_that_cannot_be_what_its_columns_say(columns, reason):
    with pytest.raises(UnusableRow, match=reason):
        read(**columns)


def test_columns_that_name_no_prompt_have_no_shape():
    assert shape_of(["text"]) is None and shape_of(["chosen"]) is None and shape_of(["real"]) is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["prompt", "response", "id"], ["prompt", "response"]),
        (["prompt", "messages"], ["messages"]),
        (["prompt", "messages", "chosen", "rejected"], ["prompt", "chosen", "rejected"]),
        (["prompt", "prompt_id", "checks", "source", "generate_0"], ["prompt", "prompt_id", "checks", "source"]),
    ],
)
def test_only_what_is_needed_is_read(names, expected):
    assert columns_read(shape_of(names), names) == expected
