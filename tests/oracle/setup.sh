#!/bin/sh
# tests/oracle/setup.sh [DIRECTORY]: an environment with llm-blender itself, in .venv-oracle by default; `make oracle` runs it.
#
# llm-blender 0.0.2 does not run on transformers 5, so it gets transformers 4.57.6 of its own. torch and everything else is that of .venv
# (a path file behind its own packages): a quarter of a gigabyte instead of three. The environment serves
#   the test that compares the native scorer with llm-blender:   make test-all ARGS="-k llm_blender_itself"
#   the golden numbers of the other tests, made again:           .venv-oracle/bin/python tests/assets/make_pairrm_golden.py
#   the comparison of speed:                                     .venv/bin/python -m benchmarks.pairrm
set -eu
cd "$(dirname "$0")/../.."
target=${1:-.venv-oracle}
[ -x .venv/bin/python ] || { echo "oracle: .venv is not there; run make venv first" >&2; exit 1; }
.venv/bin/python -m venv --without-pip "$target"
.venv/bin/python -m pip --python "$target/bin/python" install --quiet --no-deps \
    llm-blender==0.0.2 transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2 \
    dataclasses-json==0.6.7 marshmallow==3.26.2 typing-inspect==0.9.0 mypy-extensions==1.2.0
own=$("$target/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$own/zz_borrowed.pth"
# llm_blender imports vLLM if it finds one, and that of .venv is for transformers 5.
echo 'raise ImportError("not in this environment")' > "$own/vllm.py"
"$target/bin/python" -c 'import llm_blender, transformers; print("llm-blender on transformers", transformers.__version__)'
