#!/bin/bash
#SBATCH --job-name=selfplay
#SBATCH --ntasks=1
#SBATCH --signal=B:TERM@120
#SBATCH --no-requeue
# run.sh RUN.yaml: a whole run inside one allocation of one node (execution.profile local: its workers share the node's GPUs). Ends with 0 only if the run did.
# With profile slurm instead, start the run itself on a login or service node: it asks for jobs as it needs them.
set -euo pipefail
cd "${SELFPLAY_HOME:-$SLURM_SUBMIT_DIR}"
export SELFPLAY_STORE=${SELFPLAY_STORE:?set it to a directory that every node sees}
# In the background, so that the signal before the end of the allocation reaches it: stages then end, and nothing that is whole is lost.
.venv/bin/python -m flows "$@" &
run=$!
trap 'kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do # the signal ended the wait, not the run
    wait "$run" || code=$?
done
exit "$code"
