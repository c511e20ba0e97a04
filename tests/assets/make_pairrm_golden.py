"""Freeze what llm-blender 0.0.2 says of the tiny checkpoint: run in its own environment (`make oracle`), writes pairrm_golden.json.

.venv-oracle/bin/python tests/assets/make_pairrm_golden.py
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pairrm_tiny


def main() -> None:
    import llm_blender
    import numpy as np
    import torch
    import transformers

    golden = {"llm_blender": "0.0.2", "transformers": transformers.__version__, "cases": {}}
    with tempfile.TemporaryDirectory() as work:
        paths = pairrm_tiny.build(Path(work))
        blender = llm_blender.Blender()
        blender.blender_config.use_tqdm = False
        blender.loadranker(str(paths["ranker"]), device="cpu")
        for name, case in pairrm_tiny.cases().items():
            batch = blender.ranker_collator([{"source": case["prompt"], "candidates": case["candidates"]}])
            batch = {key: value for key, value in batch.items() if value is not None}
            with torch.no_grad():
                logits = blender.ranker._full_predict(**batch)["logits"][0].numpy()
            ranked = blender.rank(
                [case["prompt"]], [case["candidates"]], return_scores=True, batch_size=1, disable_tqdm=True
            )[0]
            if np.abs(ranked - (logits - logits.T).mean(axis=1)).max() > 1e-5:
                raise SystemExit(f"{name}: rank() does not follow from the logits")
            golden["cases"][name] = {
                "logits": np.round(logits.astype(float), 8).tolist(),
                "scores": np.round(ranked.astype(float), 8).tolist(),
                "source_length": int(batch["source_attention_mask"].sum()),
                "candidate_lengths": batch["candidate_attention_mask"][0].sum(dim=1).tolist(),
                "source_ids": batch["source_ids"][0].tolist()[:40],
            }
    Path(__file__).with_name("pairrm_golden.json").write_text(json.dumps(golden, indent=1) + "\n")
    print({name: np.round(case["logits"][0], 3).tolist() for name, case in golden["cases"].items()})


if __name__ == "__main__":
    main()
