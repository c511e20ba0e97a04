# What the stages run in, on nodes with NVIDIA GPUs: one lock, three targets that share their layers. Each proves at build time that its engine imports.
#   for stage in sampling training evaluation; do
#     docker build -f deploy/docker/stages.Dockerfile --target $stage -t selfplay/$stage:0.1.0 .
#   done
FROM python:3.11.14-slim-bookworm AS base

# gcc: Triton compiles its launchers at run time. libnuma1: vLLM and DeepSpeed bind to it.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 && rm -rf /var/lib/apt/lists/*
# hadolint takes TOKENIZERS_PARALLELISM for a secret token.
# hadolint ignore=DL3064
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONPATH=/app \
    SELFPLAY_HOME=/app SELFPLAY_STORE=/store DO_NOT_TRACK=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false \
    PREFECT_HOME=/home/selfplay/.prefect HF_HOME=/store/huggingface \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
COPY deploy/locks/gpu.txt /tmp/lock.txt
RUN pip install --no-deps -r /tmp/lock.txt && rm /tmp/lock.txt
RUN groupadd --gid 10001 selfplay && useradd --uid 10001 --gid 10001 --create-home selfplay && install -d -o 10001 -g 10001 /store
COPY --chown=10001:10001 data_contracts data_contracts
COPY --chown=10001:10001 stages stages
COPY --chown=10001:10001 tasks tasks
COPY --chown=10001:10001 flows flows
COPY --chown=10001:10001 deploy deploy
COPY --chown=10001:10001 prefect.yaml pyproject.toml ./
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["python", "-m"]
CMD ["prefect", "worker", "start", "--pool", "selfplay-work", "--with-healthcheck"]

FROM base AS sampling
RUN python -c "import importlib.util as u; assert u.find_spec('vllm'), 'no vllm'"

FROM base AS training
RUN python -c "import importlib.util as u; assert u.find_spec('deepspeed'), 'no deepspeed'"

FROM base AS evaluation
RUN python -c "import importlib.util as u; assert u.find_spec('lm_eval'), 'no lm_eval'"
