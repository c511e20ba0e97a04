"""What a judge read and wrote is told to the stage, and the seconds waited for it."""

from stages.scoring import SCORERS, endpoint
from stages.scoring.base import Candidates, Services


def test_a_judges_tokens_come_from_what_its_replies_say(tmp_path, monkeypatch):
    told, waited = [], []

    class Wait:
        def __enter__(self):
            waited.append(1)

        def __exit__(self, *error):
            pass

    config = SCORERS.config({"name": "llm_judge", "model": "m"})
    scorer = SCORERS.get("llm_judge")(config, "cpu")
    scorer.prepare(Services(tmp_path, 100, print, used=lambda *counts: told.append(counts), waiting=Wait))
    body = {"choices": [{"message": {"content": "Score: 3"}}], "usage": {"prompt_tokens": 50, "completion_tokens": 7}}

    async def post(asking, client, request):
        return body

    monkeypatch.setattr(endpoint._Round, "_post", post)
    prompt = {"messages": [{"role": "user", "content": "Hello?"}]}
    scorer.score([Candidates(prompt, [{"completion": "one"}, {"completion": "two"}], None)])
    assert told == [("", 100, 14)] and waited == [1]
