"""A package of somebody else, made word for word of the code blocks in stages/methods/README.md."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
README = ROOT / "stages" / "methods" / "README.md"

BROKEN = {
    "absent": "my_package.absent:Absent",
    "misspelt": "my_package.slack:Slakc",
    "raises": "my_package.raises:Raises",
    "settingless": "my_package.settingless:Settingless",
    "baseless": "my_package.settingless:Baseless",
}
"""Entry points of methods that do not load, each in its own way."""


def code_blocks(language: str) -> list[str]:
    """The README's blocks of a language, in its order: those of a method, then those of a weight provider."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def table_lines() -> list[tuple[str, str]]:
    """The README's lines for METHODS and WEIGHTS: name and target."""
    return re.findall(r'`"(\w+)": "([\w.]+:\w+)"`', README.read_text(encoding="utf-8"))


def write_package(directory: Path, broken: bool = False) -> Path:
    """Write the package and the metadata that an installer would, for a directory on sys.path."""
    package = directory / "my_package"
    package.mkdir(parents=True)
    for name, source in zip(("slack", "first_tokens"), code_blocks("python"), strict=True):
        (package / f"{name}.py").write_text(source, encoding="utf-8")
    groups: dict[str, dict[str, str]] = {}
    for block in code_blocks("toml"):
        groups |= tomllib.loads(block)["project"]["entry-points"]
    if broken:
        (package / "raises.py").write_text("1 / 0\n")
        (package / "settingless.py").write_text(
            "from stages.methods.base import Method\nclass Settingless(Method): ...\nclass Baseless: ...\n"
        )
        groups["selfplay.methods"] |= BROKEN
    metadata = directory / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    lines = []
    for group, entries in groups.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return directory
