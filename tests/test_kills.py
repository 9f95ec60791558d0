"""Killed at random moments, a run loses no step and makes none twice."""

import subprocess
import sys
from pathlib import Path

import pytest

from support import checkpoint


def test_what_a_kill_at_the_end_of_an_export_leaves_is_no_obstacle(tmp_path, monkeypatch):
    """The second export is killed before it removes the first one; the third one finds both."""
    for number in range(3):
        with (
            monkeypatch.context() as patch,
            checkpoint.atomic_directory(tmp_path / "model") as work,
        ):
            (work / "weights").write_text(str(number))
            if number == 1:
                patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)
    assert (tmp_path / "model" / "weights").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_random_kills_change_nothing():
    script = Path(__file__).parent / "kill_runs.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "50", "--seed", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.splitlines()[-1]
    assert (
        last.startswith("50 kills, ") and " 0 lost, 0 doubled" in last and " 0 finished" not in last
    )
