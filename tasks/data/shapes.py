"""Tasks - the shape of a row, told by the names of its columns, and the row of `prompts` that it becomes.

    shape           a row has                              known from
    SPIN            real, generated                        SPIN's iterations
    conversations   conversations [system] [chosen, ...]   ShareGPT, LLaMA-Factory
    instruction     instruction [input | context] ...      Alpaca, Dolly, UltraFeedback's raw form
    prompts         prompt or messages ...                 our own format, TRL, UltraFeedback (binarized), UltraChat,
    KTO, SPPO dialogues       chosen, rejected                       HH-RLHF; TRL with an implicit prompt

The first three and the fourth may have answers beside the prompt: a pair (`chosen`, `rejected`), a single one with a
`label`, or one that is taken for the truth (`response`, `output`, `completion`, or the assistant's last turn).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from data_contracts.prompts import Message, PromptRow, UnusableRow, labelled_sides, prompt_row
from tasks.data.turns import assistant, conversation, dialogue, last_answer, parsed, text, user

Columns = Mapping[str, Any]

PAIR = ("chosen", "rejected")
CHATS = ("messages", "conversations")
LABELS = ("label", "kto_tag")
LABEL_WORDS = {"true": True, "yes": True, "1": 1, "1.0": 1, "false": False, "no": False, "0": 0, "0.0": 0}
TWO, BETTER = ("response_0", "response_1"), "better_response_id"
TRUTHS = ("response", "output", "completion")
OWN = ("prompt_id", "checks", "source")
"""Columns that are read beside every shape."""


class Answers(NamedTuple):
    """What a row says beside its prompt."""

    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None


class Shape(NamedTuple):
    """Rows that are read alike."""

    name: str
    fits: Callable[[Collection[str]], bool]
    """Whether rows with columns of these names have this shape."""
    columns: tuple[str, ...]
    """What it reads of a row, beside OWN."""
    read: Callable[[Columns], tuple[list[Message], Answers]]
    """Prompt and answers of a row. Raises: UnusableRow."""


def shape_of(names: Collection[str]) -> Shape | None:
    """The shape of rows with columns of these names; None: there is no prompt among them."""
    return next((shape for shape in SHAPES if shape.fits(names)), None)


def columns_read(shape: Shape, names: Collection[str]) -> list[str]:
    """Those of a row's columns that the shape reads."""
    unread: set[str] = set()
    if "prompt" in names and shape is PROMPTS:
        # A conversation beside a prompt begins with it; beside a pair it repeats one of the two.
        unread = set(CHATS) if set(PAIR) <= set(names) else {"prompt"} if set(CHATS) & set(names) else set()
    return [name for name in names if name in {*shape.columns, *OWN} - unread]


def read_row(shape: Shape, columns: Columns) -> PromptRow:
    """The row of `prompts` that a row of this shape becomes. Raises: UnusableRow."""
    # How tables and Python programs write that there is nothing.
    columns = {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in columns.items()
    }
    messages, answers = shape.read(columns)
    checks, prompt_id, source = (columns.get(name) for name in ("checks", "prompt_id", "source"))
    return prompt_row(
        messages,
        prompt_id=str(prompt_id) if isinstance(prompt_id, int) else prompt_id or None,
        checks=parsed(checks) if isinstance(checks, str) else checks or [],
        source=source if isinstance(source, str) and source.strip() else None,
        **answers._asdict(),
    )


# --- one function for each shape


def _read_prompts(columns: Columns) -> tuple[list[Message], Answers]:
    prompt = columns.get("prompt")
    if prompt is None or (not _has_pair(columns) and any(columns.get(name) is not None for name in CHATS)):
        return _read_conversations(columns)
    if isinstance(prompt, list | dict):
        return _with_answers(conversation(prompt, "prompt"), columns)
    prompt = text(prompt, "prompt")
    turns = dialogue(prompt) if prompt.rstrip(" ").endswith("\n\nAssistant:") else None
    if not turns:
        return _with_answers([user(prompt)], columns)
    # The dialogue's last mark is followed by a blank, which the answers then begin with.
    messages, answers = _with_answers(turns[:-1], columns)
    return messages, Answers(*(answer and answer.removeprefix(" ") for answer in answers))


def _read_conversations(columns: Columns) -> tuple[list[Message], Answers]:
    name = next((name for name in CHATS if columns.get(name) is not None), None)
    if name is None:
        raise UnusableRow("the prompt is empty or blank", "there is no prompt")
    return _with_answers(conversation(columns[name], name), columns)


def _read_instruction(columns: Columns) -> tuple[list[Message], Answers]:
    """The input stands below the instruction, one blank line between; earlier turns stand in `history`."""
    instruction = text(columns["instruction"], "instruction")
    below = next((value for name in ("input", "context") if isinstance(value := columns.get(name), str)), "")
    if below.strip():
        instruction = f"{instruction}\n\n{below}" if instruction.strip() else below
    earlier: list[Message] = []
    for turn in columns.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UnusableRow("`history` is no list of pairs of question and answer")
        earlier += [user(text(turn[0], "history")), assistant(text(turn[1], "history"))]
    return _with_answers([*earlier, user(instruction)], columns)


def _read_dialogues(columns: Columns) -> tuple[list[Message], Answers]:
    """Two whole dialogues, as texts or conversations, that differ in their last turn."""
    dialogues: list[list[Message]] = []
    for name in PAIR:
        value = columns[name]
        turns = dialogue(value) if isinstance(value, str) else conversation(value or [], name)
        if turns is None:
            raise UnusableRow(
                f"`{name}` is no dialogue of Human and Assistant, and there is no prompt beside it",
                f'"{name}" needs a prompt: name its column, e.g. '
                "`columns: {prompt: question, chosen: chosen, rejected: rejected}`",
            )
        dialogues.append(turns)
    (*prompt, _), (*other_prompt, _) = dialogues
    if prompt != other_prompt:
        raise UnusableRow("`chosen` and `rejected` differ before their last turn")
    chosen, rejected = (last_answer(turns, name) for turns, name in zip(dialogues, PAIR, strict=True))
    return _with_system(prompt, columns), Answers(chosen=chosen, rejected=rejected)


def _read_numbered(columns: Columns) -> tuple[list[Message], Answers]:
    """Two answers, and the number of the better one."""
    better = columns[BETTER]
    if better not in (0, 1):
        raise UnusableRow(f"`{BETTER}` is neither 0 nor 1")
    chosen, rejected = (text(columns[TWO[number]], TWO[number]) for number in (int(better), 1 - int(better)))
    return _with_system([user(text(columns["prompt"], "prompt"))], columns), Answers(chosen=chosen, rejected=rejected)


def _read_spin(columns: Columns) -> tuple[list[Message], Answers]:
    """The real answer is the truth; a generated one that is empty is none."""
    real, generated = conversation(columns["real"], "real"), conversation(columns["generated"], "generated")
    if real[:-1] != generated[:-1]:
        raise UnusableRow("`real` and `generated` differ before their last turn")
    answer, other_answer = last_answer(real, "real"), last_answer(generated, "generated")
    if not other_answer.strip():
        return real[:-1], Answers(response=answer)
    return real[:-1], Answers(response=answer, chosen=answer, rejected=other_answer)


# --- answers beside a prompt


def _with_answers(messages: list[Message], columns: Columns) -> tuple[list[Message], Answers]:
    messages = _with_system(messages, columns)
    if _has_pair(columns):
        return _with_pair(messages, columns)
    answer: str | None = None
    name = next((name for name in TRUTHS if columns.get(name) is not None), None)
    if name is not None:
        value = columns[name]
        answer = value if isinstance(value, str) else last_answer(conversation(value, name), name)
    elif messages and messages[-1]["role"] == "assistant":
        *messages, last = messages
        answer = last["content"]
        if not messages:
            raise UnusableRow("the prompt is empty or blank", "there is nothing before the assistant's turn")
    label = _label(columns) if answer is not None or "completion" in columns else None
    return messages, Answers(response=answer) if label is None else Answers(**labelled_sides(answer, label))


def _with_system(messages: list[Message], columns: Columns) -> list[Message]:
    system = columns.get("system")
    if not isinstance(system, str) or not system.strip() or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _has_pair(columns: Columns) -> bool:
    return any(columns.get(name) is not None for name in PAIR)


def _with_pair(messages: list[Message], columns: Columns) -> tuple[list[Message], Answers]:
    """A better and a worse answer, each a text, one turn, or a conversation that repeats the prompt."""
    answers: dict[str, str] = {}
    for name in PAIR:
        value = columns.get(name)
        if isinstance(value, str) or value is None:
            answers[name] = value or ""
            continue
        turns = conversation(value, name)
        answers[name] = last_answer(turns, name)
        before = turns[:-1]
        if before and not _repeats(before, messages):
            raise UnusableRow(f"`{name}` begins with another prompt than the row's")
        if len(before) > len(messages):  # the prompt is one text of a longer conversation
            messages = before
    truth = columns.get("response")
    return messages, Answers(response=truth if isinstance(truth, str) and truth.strip() else None, **answers)


def _repeats(before: list[Message], prompt: list[Message]) -> bool:
    """Whether the turns before an answer are those of the prompt; a prompt of one text may be their first or last."""
    turns, expected = ([(turn["role"], turn["content"].strip()) for turn in side] for side in (before, prompt))
    return turns == expected or (len(expected) == 1 and expected in (turns[:1], turns[-1:]))


def _label(columns: Columns) -> Any:
    """Whether a single answer is good; None: the row says nothing of it."""
    name = next((name for name in LABELS if columns.get(name) is not None), None)
    if name is None:
        return None
    value = columns[name]
    if isinstance(value, str):
        value = LABEL_WORDS.get(value.strip().lower(), value)
    if name == "label" and columns.get("completion") is None and not isinstance(value, bool):
        return None  # beside other columns it may be anything, a subject or a class
    if value in (0, 1):
        return bool(value)
    return value


def _any_of(*columns: str) -> Callable[[Collection[str]], bool]:
    return lambda names: any(name in names for name in columns)


def _all_of(*columns: str) -> Callable[[Collection[str]], bool]:
    return lambda names: all(name in names for name in columns)


_ANSWERS = (*TRUTHS, *PAIR, *LABELS, "system")
NUMBERED = Shape(
    "numbered answers", _all_of("prompt", *TWO, BETTER), ("prompt", *TWO, BETTER, "system"), _read_numbered
)
PROMPTS = Shape("prompts", _any_of("prompt", "messages"), ("prompt", *CHATS, *_ANSWERS), _read_prompts)
SHAPES = (
    Shape("SPIN", _all_of("real", "generated"), ("real", "generated"), _read_spin),
    Shape("conversations", _all_of("conversations"), ("conversations", *_ANSWERS), _read_conversations),
    Shape(
        "instruction",
        _all_of("instruction"),
        ("instruction", "input", "context", "history", *_ANSWERS),
        _read_instruction,
    ),
    NUMBERED,
    PROMPTS,
    Shape("dialogues", _all_of(*PAIR), (*PAIR, "system"), _read_dialogues),
)
