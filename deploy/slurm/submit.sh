#!/bin/bash
# submit.sh COUNT RUN.yaml [sbatch options]: a run in up to COUNT jobs, one after the other. Each but the first starts only if the one before did not end
# well (its time was up, its node died) and goes on from the shards and checkpoints that are there; when one ends well the rest are dropped.
#   deploy/slurm/submit.sh 4 deploy/runs/sppo-mistral-7b.yaml --partition=gpu --nodes=1 --gpus-per-node=8 --time=24:00:00
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
count=$1 run=$2
shift 2
here=$(dirname "$0")
before=
for _ in $(seq "$count"); do
    options=()
    if [ -n "$before" ]; then
        options=("--dependency=afternotok:$before" --kill-on-invalid-dep=yes)
    fi
    before=$(sbatch --parsable "${options[@]}" "$@" "$here/run.sh" "$run")
    before=${before%%;*}
    echo "job $before"
done
