"""README's tree names every file of flows/, tasks/ and data_contracts/ in six words or fewer, and CONTRIBUTING.md stays short."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("flows", "tasks", "data_contracts")
LEFT_OUT = ("__init__.py", "__main__.py")


def tree() -> dict[str, str]:
    """Path -> its words, of every line of README's tree; directories end in a slash."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree\n")[1].split("\n## ")[0]
    entries, directories = {}, []
    for line in section.splitlines():
        if not (match := re.match(r"    ( *)(\S+) {2,}(.+)", line)):
            continue
        depth, name = len(match[1]) // 2, match[2]
        directories = directories[:depth]
        entries["".join(directories) + name] = match[3]
        if name.endswith("/"):
            directories.append(name)
    return entries


def test_the_tree_names_every_file_and_no_other():
    files = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.suffix in (".py", ".jinja", ".css") and path.name not in LEFT_OUT
    }
    named = {path for path in tree() if path.startswith(ROOMS) and not path.endswith("/")}
    assert sorted(files - named) == [] and sorted(named - files) == []
    assert [path for path in tree() if not (ROOT / path).exists()] == []


def test_the_tree_says_it_in_six_words():
    assert [path for path, words in tree().items() if path.startswith(ROOMS) and len(words.split()) > 6] == []


def test_contributing_fits_on_a_page():
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 60
