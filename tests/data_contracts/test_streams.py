"""Commands whose streams are closed, or whose reader leaves, work to their end without a traceback.

Strategy: small commands in a shell, as they are typed; what they leave behind on disk says whether they went on.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_contracts.files import follow_umask

ROOT = Path(__file__).resolve().parents[2]
WORK = """
import sys
from pathlib import Path
from data_contracts.streams import open_standard_streams
open_standard_streams()
out = open({path!r}, "w")
for number in range(20000):
    print("line", number)
    print("error", number, file=sys.stderr)
out.write("done")
out.close()
"""


def shell(line: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("redirection", ["2>&-", ">&-", ">&- 2>&- <&-", "| head -1", "2>&1 | head -1", "2>/dev/null"])
def test_the_work_goes_on(tmp_path, redirection):
    path = tmp_path / "out"
    done = shell(f"{shlex.quote(sys.executable)} -c {shlex.quote(WORK.format(path=str(path)))} {redirection}")
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr
    assert path.read_text() == "done"  # and nothing of the output


@pytest.mark.parametrize(
    "command", ["-m flows ls", "-m data_contracts ls", "-m data_contracts.gc --keep-runs 0 --dry-run"]
)
@pytest.mark.parametrize("redirection", ["2>&-", ">&-", "| head -c 1"])
def test_commands_end_as_they_would(tmp_path, command, redirection):
    done = shell(f"{shlex.quote(sys.executable)} {command} --store {tmp_path / 'store'} {redirection}")
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr


def test_files_follow_the_umask(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch(mode=0o600)
    before = os.umask(0o027)
    try:
        follow_umask(tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
