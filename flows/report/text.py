"""Flows - texts of models and users in reports: shown as they are, never read as markup.

HTML escapes by itself (page.py); here are the marks that no page shows, and Markdown.
"""

from __future__ import annotations

import re

HIDDEN = (*range(0x00, 0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0))
"""Controls that no page shows, tabs and line ends excepted."""
DIRECTIONS = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Marks that turn the direction of the text after them: what is read is not what is written."""
INVISIBLE = (0x200B, 0x2060, 0xFEFF, *range(0xE0000, 0xE0080))
_VISIBLE = {code: f"[U+{code:04X}]" for code in (*HIDDEN, *DIRECTIONS, *INVISIBLE)}
_MARKUP = re.compile(r"[\\`*_\[\]<>&|!#~$@]|(?<=[A-Za-z]):(?=\S)|(?<=www)\.", re.IGNORECASE)


def visible(text: str) -> str:
    """Return the text with a name in place of each character that is not seen or turns the direction of others.

    >>> visible("pay \\u202eeno")
    'pay [U+202E]eno'
    """
    return text.translate(_VISIBLE)


def as_markdown(text: str) -> str:
    """Return Markdown that shows the text as it is: no heading, link, image, HTML or address is made of it.

    >>> as_markdown("**a** <b> [x](javascript:y)")
    '\\\\*\\\\*a\\\\*\\\\* &lt;b&gt; \\\\[x\\\\](javascript\\\\:y)'
    """
    entities = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
    return visible(_MARKUP.sub(lambda match: entities.get(match[0], "\\" + match[0]), text))
