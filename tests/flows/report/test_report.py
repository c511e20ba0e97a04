"""report.md and report.html from records alone, and the page in a real browser.

Strategy: a store of two iterations is written by hand (weights that vary, a held-out answer that nobody could score, a
hostile completion); History reads it as it reads a run. The page is then opened by headless Chromium at the width of a
phone and of a laptop.
"""

import json
import logging
import re
import shutil
from html import unescape
from xml.etree import ElementTree

import pytest

import flows.report.history
import flows.report.prefect_pages
from data_contracts.artifact import ArtifactRecord, ArtifactRef
from data_contracts.prompts import prompt_row
from data_contracts.shards import SCHEMAS, shard_path, to_table, write_shard
from data_contracts.store import Store
from flows.config import load_run
from flows.gate import Gate
from flows.hands import read_report
from flows.report.about import loading_lines
from flows.report.answers import side_by_side
from flows.report.figures import Series, histograms, lines
from flows.report.figures import number as short_number
from flows.report.history import History
from flows.report.overlay import LaidRun, not_comparable, overlay
from flows.report.page import render_comparison
from flows.report.prefect_pages import PrefectPages
from flows.report.story import ShownPrompt, TokenPieces, shown_prompts
from flows.report.token_cards import middle_of, token_weights
from flows.report.weights import token_pieces
from tasks.build import Built
from tasks.place import Place
from tests.browser import visit

HOSTILE = (
    "<script>document.title='broken'</script> & <b>bold</b> https://example.com/x.js\x00 "
    "[here](javascript:document.title='broken') ![i](https://example.com/i.png) pay \u202eeno\u202c | # x `code`"
)
FIGURES = (
    "score gain win-rates scores token-counts preference-accuracy preference-margin preference-loss given-logps "
    "benchmark-0 benchmark-1 benchmark-2 rewards logps margins accuracy loss grad-norm learning-rate weights-1 weights-2 "
    "heat lengths fluency rates dropped seconds"
)


class Silent:
    """A tracker that keeps the summaries it gets."""

    def __init__(self):
        self.summaries = []

    def stage(self, *_):
        pass

    def summary(self, iteration, values):
        self.summaries.append((iteration, values))


def sign(store: Store, kind: str, key: str, stage: str, inputs=None, metrics=None, seconds=10.0) -> Built:
    record = ArtifactRecord(
        kind=kind, key=key, stage=stage, version="1", config={}, inputs=inputs or {}, content="", files=[], rows=0,
        metrics=metrics or {}, seconds={"wall": seconds},
        provenance={"time": "2026-11-28T10:05:00+0100", "hardware": "2 cores of AMD EPYC, 24 GiB"},
    )  # fmt: skip
    store.directory(kind, key).mkdir(parents=True, exist_ok=True)
    (store.directory(kind, key) / "data.txt").write_text(key)
    record = store.sign(record)
    return Built(record.ref(str(store.directory(kind, key))), record, False)


def rows_of(
    store: Store, kind: str, key: str, rows: list[dict], prefix: str = "part", schema: str | None = None
) -> None:
    write_shard(shard_path(store.directory(kind, key), 0, prefix), to_table(rows, schema or kind))


def evaluation(store: Store, iteration: int, prompts: Built, scored: bool = True) -> Built:
    key = f"e{iteration}"
    heldout = [
        {
            "prompt_id": f"p{i}",
            "candidate": 0,
            "completion": HOSTILE if i == 0 else f"answer {i} of iteration {iteration}",
            "score": None if i == 3 or not scored else 0.1 * iteration + 0.01 * i,
            "num_tokens": 20 + i + iteration * (i % 3),
            "finished": True,
            "start_logp": -1.0 - 0.1 * iteration,
        }
        for i in range(30)
    ]
    base = {"low": None, "high": None, "stderr": None, "n": 30, "n_shot": 0, "task_version": "1"}
    report = [
        {"suite": "heldout", "task": "heldout", "metric": metric, **base, "value": value}
        for metric, value in {
            "mean_tokens": 20.0 + iteration,
            "finished_rate": 1.0,
            "start_logp": -1.0,
            "distinct_rate": 0.9,
            "preference_accuracy": 0.5 + 0.1 * iteration,
            "preference_margin": 0.3 * iteration,
            "preference_loss": 0.69 - 0.1 * iteration,
            "chosen_logp": -2.0,
            "rejected_logp": -2.5,
            "response_logp": -2.0 + 0.1 * iteration,
        }.items()
    ]
    if scored:
        score = {"value": 0.2 + 0.1 * iteration, "low": 0.1, "high": 0.4}
        report.append({"suite": "heldout", "task": "heldout", "metric": "score", **base, **score})
    arc = {
        "suite": "lm-eval",
        "task": "arc",
        "metric": "acc",
        "value": 0.4 + 0.05 * iteration,
        "stderr": 0.03,
        "low": 0.34,
        "high": 0.46,
    }
    judged = {"suite": "mt_bench", "task": "mt_bench", "task_version": "grader", "n": 16}
    report += [base | judged | {"metric": "failed_judgments", "value": 16.0 if iteration == 1 else 2.0}]
    report += [base | judged | {"metric": "score", "value": 5.0 + iteration}] if iteration != 1 else []
    report += [base | arc, base | arc | {"suite": "open_llm", "value": 0.3}]
    rows_of(store, "eval_report", key, report)
    rows_of(store, "eval_report", key, heldout, "heldout", "heldout")
    return sign(store, "eval_report", key, "evaluate", {"prompts": prompts.ref})


def weighing(store: Store, iteration: int, ones: bool, dropped: float = 2.0) -> Built:
    def side(number, first):
        ids = [first + j for j in range(10 + number)]
        weights = [1.0 if ones else 0.5 + 0.1 * (j % 10) for j in range(len(ids))]
        return ids, weights

    rows = []
    for number in range(6):
        row = dict.fromkeys(SCHEMAS["weighted_pairs"].names)
        (chosen, good), (rejected, bad) = side(number, 60), side(number, 90)
        row |= {
            "pair_id": f"p{number}/0-1",
            "prompt_id": f"p{number}",
            "prompt_ids": [5, 6],
            "win_rate_chosen": 0.7,
            "win_rate_rejected": 0.3,
        }
        row |= {"chosen_ids": chosen, "chosen_weights": good, "rejected_ids": rejected, "rejected_weights": bad}
        row |= {"chosen_candidate": 0, "rejected_candidate": 1}
        rows.append(row)
    key = f"w{iteration}"
    rows_of(store, "weighted_pairs", key, rows)
    ends = {"min": 1.0, "max": 1.0} if ones else {"min": 0.5, "max": 1.4}
    metrics = {f"weights/{name}/{end}": value for name in ("chosen", "rejected") for end, value in ends.items()}
    return sign(
        store,
        "weighted_pairs",
        key,
        "weigh",
        metrics=metrics | {"weights/at_L": 0.12, "weights/at_U": 0.03, "pairs": 6.0, "dropped": dropped},
    )


@pytest.fixture
def published(monkeypatch):
    """What would go to Prefect."""
    sent = []
    for name in ("create_table_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(flows.report.prefect_pages, name, lambda *_, key, kind=name, **__: sent.append((kind, key)))
    return sent


@pytest.fixture
def history_of(store, make_run, tiny_model, make_prompts, make_rows, published):
    """history_of(ones=False, scored=True, iterations=2, ...) -> History of a run that is on disk."""

    def tell(ones=False, scored=True, iterations=2, single_reason=False, sources=("",)):
        config = load_run(make_run("paper"))
        rows = [
            row | {"prompt_id": f"p{i}", "source": sources[i % len(sources)]} for i, row in enumerate(make_rows(30))
        ]
        prompts = make_prompts(store, rows)
        prompts = Built(prompts, store.load("prompts", prompts.key), False)
        answers = sign(store, "generations", "g", "sample")
        start = sign(store, "checkpoint", "c0", "train").ref.model_copy(update={"path": str(tiny_model)})
        history = History(config, store, Silent(), PrefectPages("paper", logging.getLogger("test")))
        gate = Gate(config.gate, start)
        report = evaluation(store, 0, prompts, scored)
        history.measured(Place(str(store.root), "paper"), answers, report)
        gate.begin(read_report(report.ref))
        for iteration in range(1, iterations + 1):
            place = Place(str(store.root), "paper", iteration)
            directory = store.directory("checkpoint", f"c{iteration}")
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny_model / "tokenizer.json", directory)
            names = (
                "rewards/chosen",
                "rewards/rejected",
                "rewards/margins",
                "rewards/accuracies",
                "logps/chosen",
                "logps/rejected",
                "loss",
                "grad_norm",
                "learning_rate",
            )
            lines = [
                {"step": step, **{name: 0.1 * step * (-1 if "rejected" in name else 1) for name in names}}
                for step in range(1, 9)
            ]
            (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            score = sign(
                store,
                "scored_pairs",
                f"s{iteration}",
                "score",
                inputs={"prompts": prompts.ref},
                metrics={"dropped/all equal": 4.0} | ({} if single_reason else {"spoilt/repeats itself": 7.0}),
            )
            trained = {"rows_trained": 6.0, "steps": 8.0}
            train = sign(store, "checkpoint", f"c{iteration}", "train", {"policy": start}, trained)
            weighed = weighing(store, iteration, ones, 0.0 if single_reason else 2.0)
            history.built(place, sample=answers, score=score, weigh=weighed, train=train)
            report = evaluation(store, iteration, prompts, scored)
            history.measured(place, answers, report)
            verdict = gate.judge(train.ref, read_report(report.ref), iteration)
            history.decided(place, verdict)
        return history

    return tell


def page_of(history) -> str:
    return history.write_report().with_suffix(".html").read_text()


def test_the_page_holds_every_figure_and_nothing_from_outside(history_of):
    page = page_of(history_of())
    assert {f"fig-{name}" for name in FIGURES.split()} == set(re.findall(r'id="(fig-[^"]+)"', page))
    assert len(page) < 3_000_000
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)[^"']*""", page)
    assert "url(" not in page


def test_each_figure_is_a_file_of_its_own_too(history_of):
    history = history_of()
    folder = history.write_report(plots=True).with_name("plots")
    gain = (folder / "gain.svg").read_text()
    assert re.search(r'<rect class="f1" .*\n<text .*>at equal length</text>', gain)  # a file says what its colours mean
    assert {path.stem for path in folder.iterdir()} == set(FIGURES.split()) - {"heat"}
    for path in folder.iterdir():
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and len(root) > 3


def test_the_table_as_markdown_has_the_gain_at_equal_length_and_a_path_can_be_copied(history_of):
    history = history_of()
    text = history.write_report().read_text()
    assert re.search(r"^\| iteration \| gain at equal length \\\[95 %\\\] \| heldout_score ", text, re.M)
    assert re.search(r"^\| 0 \|  \| .*\n\| 1 \| [+-]0\.\d{3} \\\[[+-]0\.\d{3}, ", text, re.M)
    assert f"- checkpoint: `{history.store.directory('checkpoint', 'c2')}`" in text


def test_an_id_that_nobody_wrote_is_not_shown(store, make_prompts):
    rows = [prompt_row([{"role": "user", "content": text}], prompt_id=name) for text, name in (("a", None), ("b", "B"))]
    prompts = make_prompts(store, rows)
    names = {row["prompt_id"]: name for row, name in zip(rows, ("'a'", "B"), strict=True)}
    assert {key: shown.name for key, shown in shown_prompts(prompts).items()} == names
    assert [shown.text for shown in shown_prompts(prompts, ["B", "no such"]).values()] == ["b"]


def test_the_head_says_what_the_run_is_and_how_to_load_its_model(history_of):
    history = history_of()
    page = unescape(page_of(history))
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert facts["method"].startswith("sppo (eta 20") and facts["seed"] == "0"
    assert facts["reference"] == "the policy as each iteration finds it"
    assert facts["policy"] == history.config.policy.path
    assert facts["data"] == f"{history.config.prompts.train}; held out: {history.config.prompts.heldout}"
    assert facts["hardware"] == "2 cores of AMD EPYC, 24 GiB"
    assert facts["built"] == "2026-11-28 09:05 to 09:05 UTC"
    checkpoint = str(history.store.directory("checkpoint", "c2"))
    assert facts["checkpoint"] == checkpoint
    assert f"AutoModelForCausalLM.from_pretrained({checkpoint!r})" in page
    assert f"AutoTokenizer.from_pretrained({checkpoint!r})" in (history.directory / "report.md").read_text()


def test_what_the_policies_make_of_given_texts_is_in_the_table_and_drawn(history_of):
    history = history_of()
    row = history.rows[-1]
    assert (row["preference_accuracy"], row["preference_margin"], row["response_logp"]) == (0.7, 0.6, -1.8)
    assert "Held-out pairs and responses" in page_of(history)


def test_the_head_of_a_run_that_has_trained_nothing_names_no_model_to_load(history_of):
    page = page_of(history_of(iterations=0))
    assert "<dt>method</dt>" in page and "from_pretrained" not in page and "<dt>checkpoint</dt>" not in page


def test_an_adapter_alone_is_loaded_onto_its_base(store, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "adapter").mkdir(parents=True)
    (checkpoint / "adapter" / "adapter_config.json").write_text("{}")
    base = ArtifactRef(kind="checkpoint", key="external", path=str(tmp_path), content="c")
    record = ArtifactRecord(kind="checkpoint", key="k", stage="train", version="1", config={}, inputs={"policy": base},
                            content="", files=[], rows=0)  # fmt: skip
    (checkpoint / "record.json").write_text(record.model_dump_json())
    lines = loading_lines(checkpoint).splitlines()
    assert lines[-2] == f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    assert lines[-1] == f"model = PeftModel.from_pretrained(model, {str(checkpoint / 'adapter')!r})"


def test_what_trained_and_why_the_rest_did_not_stands_in_a_table(history_of):
    page = page_of(history_of(single_reason=True))
    assert "<th>pairs to train on</th><th>trained</th><th>steps</th><th>not trained, and why</th>" in page
    assert "<td>6</td><td>6</td><td>8</td><td>4 score: all equal</td>" in page
    assert "</i>score: all equal (8)</span>" in page  # a reason that is alone is named in the figure too


def test_rows_of_several_sources_are_told_apart(history_of):
    page = page_of(history_of(sources=("web", "<b>books</b>")))
    assert "By source" in page and "<td>web</td><td>30</td><td>6</td><td>15</td>" in page
    assert "<td>&lt;b&gt;books&lt;/b&gt;</td>" in page
    assert "By source" not in page_of(history_of())


def test_two_suites_with_one_task_have_a_column_each(history_of):
    assert {"lm-eval/arc/acc": 0.5, "open_llm/arc/acc": 0.3}.items() <= history_of().rows[-1].items()


def test_judgments_that_failed_are_counted_and_a_benchmark_without_any_is_unscored(history_of):
    history = history_of()
    page = page_of(history)
    assert "Judgments that failed" in page
    assert "<td>1</td><td>mt_bench</td><td>16</td><td>16</td><td>grader</td><td>unscored</td>" in page
    assert "<td>2</td><td>mt_bench</td><td>2</td><td>16</td><td>grader</td><td>of the others</td>" in page
    assert history.rows[1]["mt_bench"] is None and "mt_bench/score" not in history.rows[1]
    assert history.rows[2]["mt_bench/score"] == 7.0


def test_what_a_model_wrote_is_text(history_of):
    page = page_of(history_of())
    assert "&lt;script&gt;document.title=" in page and "pay [U+202E]eno[U+202C]" in page
    assert "<b>bold</b>" not in page and '<a href="javascript' not in page and "\u202e" not in page


def test_what_a_model_wrote_is_text_in_markdown_too(history_of):
    """Read by the Markdown reader that Prefect's and MLflow's dependencies bring (rich's)."""
    from markdown_it import MarkdownIt

    history = history_of()
    text = history.write_report().read_text()
    tokens = MarkdownIt("commonmark", {"html": True, "linkify": False}).parse(text)
    kinds = {child.type for token in tokens for child in token.children or ()} | {token.type for token in tokens}
    assert not kinds & {"html_inline", "html_block", "link_open", "image"}
    code = [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
    assert code == [str(history.store.directory("checkpoint", "c2"))]  # our own path, and nothing that a model wrote
    assert "pay [U+202E]eno" in " ".join(token.content for token in tokens).replace("\\", "")
    assert not re.search(r"[\u202a-\u202e\u2066-\u2069\x00-\x08]", text)
    shown = [child.content for token in tokens for child in token.children or () if child.type.startswith("text")]
    assert any("document.title=" in content for content in shown)


def test_weights_show_their_histogram_clamps_and_tokens(history_of):
    page = page_of(history_of())
    assert "at a bound: at_L 12.0%, at_U 3.0%" in page
    assert page.count('class="wm5"') > 2
    assert 'title="0.500"' in page


def test_a_card_of_tokens_bears_the_prompt_and_shows_less_and_more(history_of, make_rows):
    page = unescape(page_of(history_of()))
    title = re.search(r"<h3>(.*?) <small>p0</small></h3>", page)[1]
    assert title == make_rows(30)[0]["messages"][0]["content"]
    assert page.count('class="wm5"') > 2 and page.count('class="wp5"') > 2
    assert "Blue: less than 1.00; orange: more. <span>0.50 </span>" in page


def test_a_prompt_that_its_heading_says_whole_is_not_said_again():
    heldout = {"start": [{"prompt_id": name, "completion": "a", "score": 1.0, "num_tokens": 1} for name in "ab"]}
    prompts = {"a": ShownPrompt("'Name a fruit.'", "Name a fruit."), "b": ShownPrompt("'Name...'", "Name a pear.")}
    assert [item.prompt for item in side_by_side(heldout, prompts, ("", ""))] == ["", "Name a pear."]


@pytest.mark.parametrize(
    ("weights", "middle"),
    [
        ([0.5, 0.9, 4.0, 4.0, 4.0], 1.0),  # 1 changes nothing
        ([0.2, 0.3, 0.5], 0.3),  # all below 1: the median
        ([0.2, 0.8, 0.8, 0.8], 0.5),  # most are clamped at an end
    ],
)
def test_the_middle_weight_has_others_on_both_sides(weights, middle):
    assert middle_of(weights) == pytest.approx(middle)
    shown = token_weights(1, [TokenPieces("", "p", {"chosen": [("a", w) for w in weights], "rejected": []})])
    shades = [token.shade for token in shown.examples[0].sides[0][1]]
    assert shades[0] == "wm5" and shades[-1] == "wp5"


def test_a_pointer_over_a_plot_is_shown_the_values_there():
    curves = [
        Series("<a>", range(1, 1001), [0.5] * 1000, dots=False),
        Series("b", [1, 1000], [2.0, None], [1.5, None], [2.5, None]),
    ]
    drawing = lines("title", curves, "step, all iterations", "y")
    columns = re.findall(r'<rect class="hover".*?<title>(.*?)</title></rect>', drawing.body, re.DOTALL)
    assert columns[0] == "step 1\n&lt;a&gt;: 0.5\nb: 2 [1.5, 2.5]"
    assert 50 < len(columns) <= 100 and columns[-1].endswith("&lt;a&gt;: 0.5")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (-1500.0, "\u22121500"),
        (7.5e-7, "7.5e\u22127"),
        (0.00015, "1.5e\u22124"),
        (1e6, "1e6"),
    ],
)
def test_a_number_is_as_short_as_it_can_be_read(value, text):
    assert short_number(value) == text


def test_a_histogram_tells_each_bin():
    drawing = histograms("t", [0.0, 1.0, 2.0], [("before", [0.25, 0.75]), ("after", [1.0, 0.0])], "score", "part")
    columns = re.findall(r'<rect class="hover".*?<title>(.*?)</title></rect>', drawing.body, re.DOTALL)
    assert columns == ["score 0 to 1\nbefore: 0.25\nafter: 1", "score 1 to 2\nbefore: 0.75\nafter: 0"]


def test_weights_that_are_all_one_are_not_drawn(history_of):
    page = page_of(history_of(ones=True))
    assert 'id="fig-weights' not in page
    assert 'id="fig-heat"' not in page


def test_drop_reasons_add_up(history_of):
    page = page_of(history_of())
    assert "score: repeats itself (14)" in page
    assert "weigh: equal responses (4)" in page


def test_answers_that_nobody_could_score_are_counted_and_in_no_mean(history_of):
    history = history_of()
    assert [row["unscored"] for row in history.rows] == [1, 1, 1]
    assert "p3" not in history.measured_at(-1).scores
    assert history.decisions[-1]["unscored"] == 1
    assert "unscored" in page_of(history)


def test_a_run_whose_judge_was_away_still_gets_its_report(history_of):
    history = history_of(scored=False)
    page = page_of(history)
    assert history.rows[-1]["heldout_score"] is None
    assert history.headline().startswith("the held-out answers could not be scored")
    assert [decision["outcome"] for decision in history.decisions] == ["keep going", "keep going"]
    assert "<td>unscored</td>" in page
    assert "| unscored |" in (history.directory / "report.md").read_text()


def test_the_gate_is_in_both_reports_and_beside_them(history_of):
    history = history_of()
    assert "<td>promote</td>" in page_of(history)
    assert "iteration 1 against 0: promote" in (history.directory / "report.md").read_text()
    recorded = json.loads((history.directory / "gate.json").read_text())
    assert [decision["best"]["iteration"] for decision in recorded] == [1, 2]


def test_prefect_gets_the_history_the_report_and_its_figures(history_of, published):
    history = history_of()
    assert ("create_table_artifact", "paper-history") in published
    assert ("create_markdown_artifact", "paper-iter-02") in published
    history.pages.finish(history.write_report(plots=True))
    assert published[-2:] == [
        ("create_markdown_artifact", "paper-report"),
        ("create_markdown_artifact", "paper-figures"),
    ]


def test_a_figure_is_sent_inside_its_address_under_its_caption(tmp_path, monkeypatch):
    sent = {}
    monkeypatch.setattr(
        flows.report.prefect_pages, "create_markdown_artifact", lambda text, key, **_: sent.update({key: text})
    )
    (tmp_path / "report.md").write_text("# fine")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "score.svg").write_text("<svg><title>Score &amp; interval</title></svg>")
    PrefectPages("paper", logging.getLogger("test")).finish(tmp_path / "report.md")
    caption, image = sent["paper-figures"].split("\n\n")
    assert caption == "### Score &amp; interval"
    assert image.startswith("![score](data:image/svg+xml;base64,PHN2Zz48dGl0bGU+")
    assert str(tmp_path / "report.html") in sent["paper-report"] and sent["paper-report"].endswith("# fine")


def test_token_pieces_give_the_text_back(tiny_model):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    text = "She sells sea shells \u2013 na\u00efve \U0001f41a!"
    ids = tokenizer.encode(text).ids
    pieces = token_pieces(tokenizer, ids, [float(i) for i in range(len(ids))])
    assert "".join(piece for piece, _ in pieces) == text
    assert len(pieces) < len(ids)  # characters of several byte tokens are one piece


def test_runs_lie_over_each_other_with_what_differs_in_their_settings(history_of, make_run):
    history = history_of()
    story = history.story()
    worse = [[row | {"score": row["score"] and row["score"] - 0.25} for row in rows] for rows in story.heldout]
    settings = {"method": {"name": "dpo"}, "training": {"learning_rate": 0.5}, "seed": 7}
    runs = [
        LaidRun("paper", story, history.config, "../paper/report.html"),
        LaidRun(
            "<i>dpo</i>", story._replace(heldout=worse), load_run(make_run("dpo", **settings)), "../dpo/report.html"
        ),
    ]
    page = render_comparison("paper and dpo", runs, overlay(runs))
    drawn = {
        "accuracy",
        "margin",
        "response",
        "score",
        "difference",
        "tokens",
        "fluency",
        "loss",
        "rewards-margins",
        "rewards-accuracies",
        "grad-norm",
    }
    assert set(re.findall(r'id="fig-([^"]+)"', page)) == drawn | {"learning-rate"}
    assert re.findall('<li><a href="(.*?)">', page) == ["../paper/report.html", "../dpo/report.html"]
    rows = re.findall("<tr><td>([a-z_.]+)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert ("method.name", "sppo", "dpo") in rows and ("seed", "0", "7") in rows
    assert ("training.learning_rate", "0.001", "0.5") in rows and ("method.eta", "20.0", "") in rows
    assert "sampling.num_candidates" not in {name for name, *_ in rows}
    assert "<td>-0.250 [-0.250, -0.250]</td>" in page  # paired by prompt: a constant has no spread
    assert "<h4>paper, iteration 2 <b>" in page and "<h4>&lt;i&gt;dpo&lt;/i&gt;, iteration 2 <b>" in page
    assert "<i>dpo" not in page and "<script" not in page and "&lt;script&gt;" in page
    assert "not comparable" not in page
    other = load_run(make_run("dpo", **settings, evaluation={"scorer": {"name": "length", "target_tokens": 3}}))
    fewer = story._replace(heldout=[rows[1:] for rows in story.heldout])
    assert not_comparable([runs[0], LaidRun("dpo", fewer, other, "")]) == (
        "The held-out scores of these runs are not comparable: their scorers (evaluation.scorer) and held-out prompts "
        "(prompts.heldout) differ."
    )


PROBE = """<script>addEventListener('load',()=>{const f=[...document.querySelectorAll('[id^=fig-]')];
parent.postMessage(JSON.stringify({width:innerWidth,page:document.documentElement.scrollWidth,
empty:f.filter(e=>{const r=[...e.querySelectorAll('svg'),e].map(s=>s.getBoundingClientRect()).find(s=>s.width>0);
return !r||r.width<200||r.height<60}).map(e=>e.id),
wide:f.filter(e=>{const s=e.querySelector('svg.wide');return s&&s.getBoundingClientRect().width>860}).map(e=>e.id),
title:document.title,figures:f.length}),'*')})</script></head>"""
HOST = """<!doctype html><script>addEventListener('message',e=>{const p=document.createElement('pre');p.id='probe';
p.textContent=e.data;document.body.append(p)})</script>
<body><iframe width="%d" height="1600" style="border:0" src="probed.html"></iframe></body>"""


@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_shows_every_figure_without_errors_or_sideways_scrolling(history_of, tmp_path, width):
    page = page_of(history_of())
    bare = tmp_path / "page.html"
    bare.write_text(page)
    probed = tmp_path / "probed.html"  # the same page, allowed to measure itself
    probed.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</head>", PROBE))
    host = tmp_path / "host.html"  # a frame: no window is narrower than 500 pixels
    host.write_text(HOST % width)
    visited = visit(bare.as_uri(), tmp_path / "a")
    assert "CONSOLE" not in visited.log, visited.log
    probe = json.loads(unescape(re.search(r'<pre id="probe">(.*?)</pre>', visit(host.as_uri(), tmp_path / "b").dom)[1]))
    assert probe["figures"] == len(FIGURES.split())
    assert not probe["empty"]
    assert probe["wide"] == ([] if width < 860 else ["fig-dropped", "fig-seconds"])  # they stand alone
    assert probe["title"] == "paper: self-play report"
    assert probe["page"] <= probe["width"] == width
