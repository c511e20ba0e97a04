"""A mirror of every dataset that the benchmark suites read, with a handful of questions each, in the schema of the official one.

The layout is that of docs/evaluation.md: a directory per dataset, JSON Lines, and a README.md whose `configs:` name the parts.
"""

import json
from pathlib import Path

import yaml


def build(root: Path) -> Path:
    for name, configs in datasets().items():
        directory = root / name
        directory.mkdir(parents=True)
        described = []
        for config, splits in configs.items():
            files = []
            for split, rows in splits.items():
                path = directory / f"{config}-{split}.jsonl"
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
                files.append({"split": split, "path": path.name})
            described.append({"config_name": config, "data_files": files})
        (directory / "README.md").write_text("---\n" + yaml.safe_dump({"configs": described}) + "---\n")
    punkt(root / "nltk" / "tokenizers" / "punkt_tab" / "english")
    return root


def datasets() -> dict[str, dict[str, dict[str, list[dict]]]]:
    """Dataset -> config -> split -> rows."""
    mmlu = {"test": few(choice, 2), "dev": few(choice, 5)}
    gpqa = {"train": few(graduate, 3)}
    maths = {"train": few(maths_problem, 4), "test": few(maths_problem, 2)}
    ifeval = {"default": {"train": few(instruction, 2)}}
    return {
        "allenai/ai2_arc": {
            "ARC-Challenge": {"train": few(science, 26), "validation": few(science, 2), "test": few(science, 3)}
        },
        "Rowan/hellaswag": {"default": {"train": few(story, 11), "validation": few(story, 3)}},
        "truthfulqa/truthful_qa": {"multiple_choice": {"validation": few(truth, 3)}},
        "allenai/winogrande": {"winogrande_xl": {"train": few(pronoun, 6), "validation": few(pronoun, 3)}},
        "openai/gsm8k": {"main": {"train": few(sum_of_two, 6), "test": few(sum_of_two, 2)}},
        "cais/mmlu": dict.fromkeys(configs_of("mmlu/default"), mmlu),
        "SaylorTwift/bbh": {name: {"test": [first] * 2} for name, first in configs_of("leaderboard/bbh_mc").items()},
        "Idavidrein/gpqa": {f"gpqa_{name}": gpqa for name in ("main", "diamond", "extended")},
        "wis-k/instruction-following-eval": ifeval,
        "google/IFEval": ifeval,
        "DigitalLearningGmbH/MATH-lighteval": dict.fromkeys(configs_of("leaderboard/math"), maths),
        "TIGER-Lab/MMLU-Pro": {"default": {"validation": few(many_choices, 6), "test": few(many_choices, 2)}},
        "TAUR-Lab/MuSR": {
            "default": {name: few(mystery, 2) for name in ("murder_mysteries", "object_placements", "team_allocation")}
        },
        "openai/openai_humaneval": {"openai_humaneval": {"test": few(function, 2)}},
    }


def configs_of(folder: str) -> dict[str, dict]:
    """Name of each part of a group of tasks, as lm-eval's own files say -> its first example, if they hold one."""
    import lm_eval

    found = {}
    for path in sorted((Path(lm_eval.__file__).parent / "tasks" / folder).glob("*.yaml")):
        text = path.read_text().replace("!function", "")
        task = yaml.safe_load(text)
        if "dataset_name" in task and "task" in task:
            samples = (task.get("fewshot_config") or {}).get("samples")
            found[task["dataset_name"]] = (
                {name: str(value) for name, value in samples[0].items()} if isinstance(samples, list) else {}
            )
    return found


def few(make, count: int) -> list[dict]:
    return [make(i) for i in range(count)]


def science(i: int) -> dict:
    choices = {"text": [f"word {i + k}" for k in range(4)], "label": list("ABCD")}
    return {"id": str(i), "question": f"Which word is number {i}?", "choices": choices, "answerKey": "ABCD"[i % 4]}


def story(i: int) -> dict:
    row = {
        "ind": i,
        "activity_label": "Running",
        "ctx_a": f"Dog {i} sees a fox.",
        "ctx_b": "it",
        "ctx": f"Dog {i} sees a fox. it",
    }
    return row | {
        "endings": [f"runs {k}." for k in range(4)],
        "label": str(i % 4),
        "source_id": "",
        "split": "train",
        "split_type": "",
        "activity_id": "",
    }


def truth(i: int) -> dict:
    targets = {"choices": ["Yes.", "No.", "Perhaps."], "labels": [1, 1 if i else 0, 0]}
    return {"question": f"Is {i} a number?", "mc1_targets": targets | {"labels": [1, 0, 0]}, "mc2_targets": targets}


def pronoun(i: int) -> dict:
    return {
        "sentence": f"The fox saw dog {i} and _ ran away.",
        "option1": "the fox",
        "option2": "the dog",
        "answer": str(1 + i % 2),
    }


def sum_of_two(i: int) -> dict:
    return {"question": f"What is {i} and 2?", "answer": f"{i} + 2 = {i + 2}\n#### {i + 2}"}


def choice(i: int) -> dict:
    return {"question": f"What is {i} + 1?", "subject": "sums", "choices": [str(i + k) for k in range(4)], "answer": 1}


def graduate(i: int) -> dict:
    wrong = {f"Incorrect Answer {k}": f"wrong {i} {k}" for k in (1, 2, 3)}
    return {"Question": f"Which of the answers to {i} is right?", "Correct Answer": f"right {i}", **wrong}


def instruction(i: int) -> dict:
    ids = ["punctuation:no_comma", "length_constraints:number_sentences"][: i + 1]
    kwargs = [{"relation": None, "num_sentences": None}, {"relation": "less than", "num_sentences": 5}][: i + 1]
    return {"key": i, "prompt": "Write without a comma.", "instruction_id_list": ids, "kwargs": kwargs}


def maths_problem(i: int) -> dict:
    return {
        "problem": f"What is ${i} + 1$?",
        "level": "Level 5",
        "type": "Algebra",
        "solution": f"It is $\\boxed{{{i + 1}}}$.",
    }


def many_choices(i: int) -> dict:
    options = [str(i + k) for k in range(10)]
    return {
        "question_id": i,
        "question": f"What is {i} + 1?",
        "options": options,
        "answer": "B",
        "answer_index": 1,
        "category": "math",
    }


def mystery(i: int) -> dict:
    row = {"narrative": f"Dog {i} was in the wood.", "question": "Who was it?", "choices": "['the dog', 'the fox']"}
    return row | {"answer_index": 0, "answer_choice": "the dog"}


def function(i: int) -> dict:
    prompt = f'def add_{i}(a, b):\n    """Add."""\n'
    test = f"def check(candidate):\n    assert candidate(1, {i}) == {1 + i}\n"
    return {
        "task_id": f"HumanEval/{i}",
        "prompt": prompt,
        "canonical_solution": "    return a + b\n",
        "test": test,
        "entry_point": f"add_{i}",
    }


def punkt(directory: Path) -> None:
    """nltk's sentence splitter without any learned abbreviation: what IFEval loads when it is imported."""
    directory.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (directory / name).write_text("")
