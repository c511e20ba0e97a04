"""What a stage's process does not load: libraries that others import beside what they need."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MODEL_AND_ENGINE = """
import sys
from stages.models.lazy import import_transformers
import_transformers()
import transformers.models.llama.modeling_llama
from stages.training.engine import import_deepspeed
import_deepspeed("cpu")
print([name for name in ("scipy", "sklearn", "mlflow") if name in sys.modules])
import scipy, sklearn, mlflow  # still installed for whoever wants them
"""
PAIRRM = """
import sys
from stages.scoring.pairrm_model import _encoder_config
_encoder_config({}, 8)
import transformers.models.deberta_v2.modeling_deberta_v2
print([name for name in ("scipy", "sklearn", "mlflow") if name in sys.modules])
"""


@pytest.mark.parametrize("code", [MODEL_AND_ENGINE, PAIRRM], ids=["policy and training engine", "PairRM"])
def test_models_and_the_training_engine_load_without_libraries_that_no_stage_uses(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().splitlines()[-1] == "[]"
