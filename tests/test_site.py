"""docs/ as a site: every page is in its navigation, pages made from elsewhere are complete, and it is built without network."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
MADE = {"methods.md", "run_configs.md"}
"""Pages that docs/site_pages.py makes."""


@pytest.fixture(scope="module")
def site_pages():
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "docs" / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_in(nav: list | str) -> list[str]:
    """The files of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for entry in nav for value in entry.values() for page in pages_in(value)]


def test_every_page_is_in_the_navigation_once():
    pages = pages_in(SETTINGS["nav"])
    assert sorted(pages) == sorted({path.name for path in (ROOT / "docs").glob("*.md")} | MADE)


def test_a_link_of_a_page_leads_somewhere_in_the_repository_too():
    links = [
        (path.name, link)
        for path in (ROOT / "docs").glob("*.md")
        for link in re.findall(
            r"\]\(([^)#:]+)(?:#[^)]*)?\)", re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.S)
        )
        if not (path.parent / link).exists()
    ]
    assert links == []


def test_the_table_of_presets_says_of_each_what_it_is(site_pages):
    page = site_pages.presets_page()
    for path in (ROOT / "deploy" / "runs").glob("*.yaml"):
        assert re.search(rf"^\| `deploy/runs/{re.escape(path.name)}` \| \w.+ \|$", page, re.M), path


def test_the_page_of_methods_names_all_of_them_under_one_title(site_pages):
    from stages.methods import METHODS

    page = site_pages.methods_page()
    assert [name for name in METHODS.names() if f"`{name}`" not in page] == []
    assert len(re.findall(r"^# ", re.sub(r"```.*?```", "", page, flags=re.S), re.M)) == 1


def test_the_site_is_built_without_a_warning_and_asks_no_network(tmp_path):
    pytest.importorskip("material", reason="no mkdocs-material here: `make venv` brings it")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), "http://127.0.0.1:9") | {
        "NO_MKDOCS_2_WARNING": "1"
    }
    done = subprocess.run(command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in pages_in(SETTINGS["nav"]):
        text = (tmp_path / "site" / page.replace(".md", ".html")).read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|iframe)[^>]+src=\"?https?:|<link[^>]+stylesheet[^>]+https?:", text) == [], (
            page
        )
    assert not list((tmp_path / "site").rglob("*.py"))
