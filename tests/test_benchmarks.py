"""Every file of benchmarks/ runs: its `--smoke` takes the benchmark's own code path with tiny sizes and a random model.

Strategy: all are started at the first test, two at a time, in processes of their own, since some of them patch what
they measure. The benchmarks of whole runs share a store (SMOKE_STORE) and come one after the other, so that the tiny
run is built once.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))
IN_ORDER = ("orchestration", "estimate")
"""These share a store: the second finds what the first has built."""
LAST_LINES = {
    "alignment": "alignment and weights: ",
    "claims": "| ipo | ",
    "dealing": "| tidpo-llama-3.2-3b | 8 | ",
    "error_paths": "together: ",
    "estimate": "smoke  ",
    "faults": "1 faults struck, 0 came too late, 0 not survived",
    "gpu_check": "| sample | tokens_per_second | ",
    "kills": " plays, 0 of them lost, doubled",
    "orchestration": "| server and imports alone | ",
    "pairrm": "largest difference of a score ",
    "sample": "| stage | ",
    "scale": "| 4 | ",
    "soak": "nothing grew that should not",
    "store": "| 300 | ",
    "swift_weights": "| SPIN | ",
    "train": "largest difference from TRL's ",
    "trl_trajectory": "6 updates of ours on a random model; not run: TRL",
    "weights": "weights differ by ",
}
"""What the last lines of each benchmark's output contain."""
LIMIT_SECONDS = 600


def smoke(names: tuple[str, ...], store: Path) -> dict[str, subprocess.CompletedProcess]:
    """Run the benchmarks one after the other."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SMOKE_STORE": str(store)}
    return {
        name: subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", "--smoke"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_SECONDS,
            check=False,
        )
        for name in names
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Iterator[dict[str, Future]]:
    """Benchmark -> future of the results of its group."""
    root = tmp_path_factory.mktemp("smoke")
    groups = [IN_ORDER, *((name,) for name in NAMES if name not in IN_ORDER)]
    with ThreadPoolExecutor(2) as pool:
        futures = {group: pool.submit(smoke, group, root / "store") for group in groups}
        yield {name: future for group, future in futures.items() for name in group}
        for future in futures.values():
            future.cancel()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_of_a_benchmark_runs(results, name):
    done = results[name].result()[name]
    assert done.returncode == 0, done.stdout[-3000:]
    end = "\n".join(done.stdout.splitlines()[-12:])
    assert LAST_LINES[name] in end, done.stdout[-3000:]
    assert "nan" not in end or name == "pairrm", done.stdout[-3000:]
