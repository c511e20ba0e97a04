# Runs, the Prefect server, workers and the MLflow server: everything that decides and waits. No torch, no GPU.
#   docker build -f deploy/docker/orchestrator.Dockerfile -t selfplay/orchestrator:0.1.0 .
FROM python:3.11.14-slim-bookworm

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONPATH=/app \
    SELFPLAY_HOME=/app SELFPLAY_STORE=/store DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false PREFECT_HOME=/home/selfplay/.prefect
WORKDIR /app
COPY deploy/locks/orchestrator.txt /tmp/lock.txt
RUN pip install --no-deps -r /tmp/lock.txt && rm /tmp/lock.txt
RUN groupadd --gid 10001 selfplay && useradd --uid 10001 --gid 10001 --create-home selfplay && install -d -o 10001 -g 10001 /store
COPY --chown=10001:10001 data_contracts data_contracts
COPY --chown=10001:10001 stages stages
COPY --chown=10001:10001 tasks tasks
COPY --chown=10001:10001 flows flows
COPY --chown=10001:10001 deploy deploy
COPY --chown=10001:10001 prefect.yaml pyproject.toml ./
USER 10001:10001
# A worker answers on 8080 (--with-healthcheck); a server in this image brings a check of its own (deploy/compose, deploy/kubernetes).
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health', timeout=4)"]
ENTRYPOINT ["python", "-m"]
CMD ["prefect", "worker", "start", "--pool", "selfplay", "--with-healthcheck"]
