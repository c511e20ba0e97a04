#!/bin/sh
# Deploy - prints the command of a Python 3.11 or 3.12 that really runs (a version manager's shim may exist and refuse to).
# PYTHON=/path/to/python overrides the search. 3.11 comes first among equals: it is what the project is developed on.
set -u
runs() { "$1" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1 </dev/null; }

if [ -n "${PYTHON:-}" ]; then
    runs "$PYTHON" && { echo "$PYTHON"; exit 0; }
    echo "set-up: PYTHON=$PYTHON does not run as Python 3.11 or 3.12." >&2
    exit 1
fi
for candidate in python3 python3.11 python3.12 /usr/bin/python3.11 /usr/bin/python3.12 \
    /usr/local/bin/python3.11 /usr/local/bin/python3.12 "${HOME:-/nonexistent}"/.pyenv/versions/3.1[12].*/bin/python3; do
    runs "$candidate" && { echo "$candidate"; exit 0; }
done
echo "set-up: no Python 3.11 or 3.12 found. Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2
exit 1
