"""The addresses that a run's log gives, opened in a real browser: Prefect's pages, MLflow's page, and the links of report.html.

Strategy: one Prefect server, in which the tiny run is played once, and one `mlflow ui` on the store's database, both on
127.0.0.1 and both kept for all tests. Headless Chromium opens what a user would click, and the text of the page says
whether it is the run: an address with another id gives a page too, but not this text.
"""

import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from stages.running.supervise import supervisor_options
from tests.browser import chromium, visit
from tests.faults.deployed import Cluster, free_port, server, wait_for

ROOT = Path(__file__).resolve().parents[2]
RUN = "seen"
PATIENCE = 15_000
"""ms of a page's own clock in which its scripts fetch what it shows."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Played(NamedTuple):
    """A run that ended, and the server that shows it."""

    server: Cluster
    store: Path
    log: str

    def address(self, pattern: str) -> str:
        """The address in the line of the log that the pattern, with one group, describes."""
        match = re.search(pattern, self.log)
        assert match, self.log
        return match[1]


@pytest.fixture(scope="module")
def played(tmp_path_factory, tools, make_run) -> Iterator[Played]:
    chromium()
    with server(tmp_path_factory.mktemp("prefect"), tools.environment()) as prefect:
        settings = {name: prefect.environment[name] for name in ("PREFECT_API_URL", "PREFECT_HOME", "NO_PROXY")}
        done = tools.play(make_run(RUN, iterations=1), prefect.store, **settings)
        assert done.code == 0, done.out
        yield Played(prefect, prefect.store, done.out)


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Callable[[str], str]:
    """opened(address) -> the HTML that Chromium makes of it."""
    home = tmp_path_factory.mktemp("chromium")
    return lambda address: visit(address, home, PATIENCE).dom


@pytest.fixture(scope="module")
def mlflow_page(played, tmp_path_factory, tools) -> Iterator[str]:
    """The address of the run in MLflow, as the log gives it, with the port of a `mlflow ui` started by the log's command."""
    command, address = re.search(r"MLflow: `(mlflow ui .*?)`, then (http://\S+)", played.log).groups()
    port, log = free_port(), tmp_path_factory.mktemp("mlflow") / "log.txt"
    words = [sys.executable, "-m", *shlex.split(command), "--port", str(port), "--workers", "1"]
    supervised = [sys.executable, "-m", "stages.running.supervise", *supervisor_options(5), *words]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            supervised, cwd=ROOT, env=tools.environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        wait_for(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200, 120, log)
        yield address.replace("127.0.0.1:5000", f"127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(30)


def text_of(dom: str) -> str:
    """The words of a page, without its title."""
    body = re.sub(r"<(head|style|script|svg)\b.*?</\1>", "", dom, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def artifact_page(played: Played, key: str) -> str:
    """The address of the newest Prefect artifact of a key, as the UI has it."""
    [row] = played.server.ask("/artifacts/latest/filter", {"artifacts": {"key": {"any_": [key]}}})
    return played.address(r"watch it at (http://\S+)") + f"/artifacts/artifact/{row['latest_id']}"


def test_prefects_dashboard_opens_where_the_run_says_to_watch_it(played, opened):
    text = text_of(opened(played.address(r"watch it at (http://\S+)")))
    assert "Dashboard" in text and "Flow Runs 1 total" in text


def test_prefects_page_of_the_flow_run_bears_its_name_and_shows_its_log(played, opened):
    dom = opened(played.address(r"View at (http://\S+)"))
    assert f"<title>Flow Run: {RUN} " in dom
    text = text_of(dom)
    assert f"{RUN} Completed" in text
    assert "24 training prompts of 24 rows, 8 held-out prompts" in text


def test_prefect_lists_the_report_and_the_figures(played, opened):
    text = text_of(opened(played.address(r"watch it at (http://\S+)") + "/artifacts"))
    assert f"Report of {RUN}" in text and f"Main figures of {RUN}" in text


def test_the_report_opens_in_prefect(played, opened):
    """Its words, not a link to a file that no browser can open."""
    dom = opened(artifact_page(played, f"{RUN}-report"))
    text = text_of(dom)
    assert f"Self-play run {RUN}" in text and "held-out score" in text
    assert {"Promotion gate", "The data", "Settings"} <= set(re.findall(r"<h2[^>]*>([^<]*)", dom))
    assert f"Flow Run {RUN}" in text
    assert "file://" not in dom


def test_the_figures_are_drawn_in_prefect(played, opened):
    dom = opened(artifact_page(played, f"{RUN}-figures"))
    assert "Held-out score, 95 % interval over prompts" in text_of(dom)
    assert len(re.findall(r'<img src="data:image/svg\+xml;base64,', dom)) >= 5


def test_mlflow_opens_on_the_training_run_and_its_metrics(played, opened, mlflow_page, tools):
    text = text_of(opened(mlflow_page))
    assert f"Runs {RUN} Overview Model metrics" in text
    score = tools.table_of(played.store, RUN)[-1]["heldout_score"]
    assert f"heldout_score {score} " in text and "curve/loss" in text
    assert "method.name sppo" in text


def test_every_link_of_the_report_leads_somewhere(played, opened):
    """To a part of the page, or to a file that is there."""
    report = played.store / "runs" / RUN / "report.html"
    assert str(report.with_suffix(".md")) in played.log
    dom = opened(report.as_uri())
    parts = set(re.findall(r'\bid="([^"]+)"', dom))
    links = [unescape(link) for link in re.findall(r'<a\b[^>]*\bhref="([^"]*)"', dom)]
    assert len(links) >= 8
    for link in links:
        address = urlsplit(link)
        assert address.scheme in ("", "file"), link
        if address.path:
            assert (report.parent / unquote(address.path)).exists(), link
        else:
            assert address.fragment in parts, link
