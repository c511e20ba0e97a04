"""Pages of the site that are made from files elsewhere: the methods' README, and a table of the run configs.

A hook of mkdocs (mkdocs.yml); it imports nothing of the pipeline.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "deploy" / "runs"
LINKS = {"](../stages/methods/README.md)": "](methods.md)", "](../deploy/runs)": "](run_configs.md)"}
"""Links of pages as a reader of the repository needs them -> as the site has them."""
PRESETS = """# Presets

The settings of the papers, and CPU twins of them under `tiny/`. Their paths work in every directory, in a checkout and installed:
`selfplay run deploy/runs/quickstart.yaml`. Change one by `--set training.learning_rate=1e-6`, or write a file of your own that
begins with `extends: deploy/runs/sppo.yaml` and holds only what differs. `selfplay init METHOD` writes every setting with its
meaning; `selfplay plan RUN.yaml` says whether it fits your GPUs. Each number with its source, and where we differ from it:
[number by number](presets.md).

| run config | what it is |
|---|---|
"""


def about(path: Path) -> str:
    """Return what the comment at the head of a run config says, without command lines."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("#   "):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines).replace("|", "\\|")


def presets_page() -> str:
    """Return the table of all run configs and comparisons, the tiny ones in one line."""
    rows = [(path, about(path)) for path in [*sorted(RUNS.glob("*.yaml")), *sorted(RUNS.glob("compare/*.yaml"))]]
    table = [f"| `{path.relative_to(ROOT)}` | {text} |" for path, text in rows]
    tiny = [path.stem for path in sorted((RUNS / "tiny").glob("*.yaml")) if "extends" in path.read_text()]
    twins = ", ".join(f"`{name}`" for name in tiny)
    table.append(f"| `deploy/runs/tiny/NAME.yaml` | Two iterations of a 135 M model on a CPU. NAME: {twins} |")
    return PRESETS + "\n".join(table) + "\n"


def methods_page() -> str:
    """Return the methods' README; two headings of the first level become one."""
    text = (ROOT / "stages" / "methods" / "README.md").read_text(encoding="utf-8")
    first, rest = text.split("\n", 1)
    return first + "\n" + re.sub(r"^# ", "## ", rest, flags=re.M)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    from mkdocs.structure.files import File

    for name, content in {"methods.md": methods_page(), "run_configs.md": presets_page()}.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return a page whose links to the repository's own pages lead to those of the site."""
    for link, page in LINKS.items():
        markdown = markdown.replace(link, page)
    return markdown
