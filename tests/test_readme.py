"""README.md: what it links to exists, and its lines of code are the ones it names."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_links_to_lines_point_at_what_they_name():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", TEXT)
    assert len(links) >= 8
    for name, file, number in links:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", line), f"{file}#L{number} is {line!r}, not {name}"


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!https?:)([\w./-]+)", TEXT):
        assert (ROOT / target).exists(), target


def test_ci_runs_the_readme_s_test_command():
    command = next(line for line in TEXT.splitlines() if line.endswith("pytest -q"))
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
