"""Killed at random moments, a run loses no step and makes none twice."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_random_kills_change_nothing():
    script = Path(__file__).parent / "kill_runs.py"
    done = subprocess.run([sys.executable, script, "--kills", "50", "--seed", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    assert last.startswith("50 kills, ") and " 0 lost, 0 doubled" in last and " 0 finished" not in last
