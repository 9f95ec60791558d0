"""README.md and docs/: every link, file and flag that they name exists, and the README stays
short."""

import re
import sys
from pathlib import Path

import pytest
import torch

import egrsd
import eval as evaluation
import train
from experiments import (
    bench,
    compare,
    diagnostics,
    figures,
    gpu,
    gradients,
    paired,
    plot,
    report,
    smollm2,
    stories,
    sweep,
    walk,
)
from family import __main__ as lab

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RECORDS = sorted((ROOT / "results").glob("*.md"))
TORCHRUN = {"--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint"}
OF_A_RUN = {
    "config.json",
    "metrics.jsonl",
    "held_out_before.jsonl",
    "held_out_after.jsonl",
    "samples.jsonl",
    "evaluation.json",
    "results.json",
    "state.json",
    "tokens.jsonl",
    "diagnostics.json",
    "adapter_config.json",
    "only.json",
    "test.json",
    "validation.json",
    "validation.jsonl",
    "token_view.html",
    "train.jsonl",
    "test.jsonl",
    "openthoughts.jsonl",
    "aime24.jsonl",
    "math500.jsonl",
    "gsm8k_200.jsonl",
    "bench.json",
    "gpu.json",
    "report.html",
}


def text_of(page):
    return page.read_text(encoding="utf-8")


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES + RECORDS, ids=lambda page: page.name)
def test_links(page):
    text = text_of(page)
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)
    assert links
    for link in links:
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if anchor and not re.fullmatch(r"L\d+", anchor):
            headings = [
                line.lstrip("#") for line in text_of(path).splitlines() if line.startswith("#")
            ]
            assert anchor in [slug(heading) for heading in headings], link


def test_links_to_lines_point_at_what_they_name():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", text_of(ROOT / "README.md"))
    assert len(links) >= 11
    for name, file, number in links:
        line = text_of(ROOT / file).splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", line), (
            f"{file}#L{number} is {line!r}, not {name}"
        )


def test_links_of_equations_point_at_the_lines_that_carry_their_numbers():
    links = re.findall(r"\[eq\. (\(\d\))\]\((\w+\.py)#L(\d+)\)", text_of(ROOT / "README.md"))
    assert {equation for equation, _, _ in links} >= {"(4)", "(9)"}
    for equation, file, number in links:
        code, _, comment = text_of(ROOT / file).splitlines()[int(number) - 1].partition("#")
        assert code.strip() and equation in comment, f"{file}#L{number} is no line of {equation}"


@pytest.mark.parametrize("page", PAGES + RECORDS, ids=lambda page: page.name)
def test_files(page):
    for name in set(
        re.findall(r"`([\w./-]+\.(?:py|md|json|jsonl|png|html|toml|txt))`", text_of(page))
    ):
        assert (
            (ROOT / name).exists() or (page.parent / name).exists() or Path(name).name in OF_A_RUN
        ), name


def flags_in_help(name, module):
    """The flags of a command, from its --help; flags that switch also have a --no- form there."""
    printed = []

    def print_message(self, message, file=None):
        printed.append(message)

    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", [name, "--help"])
    patch.setattr("argparse.ArgumentParser._print_message", print_message)
    with pytest.raises(SystemExit):
        module.main()
    patch.undo()
    return set(re.findall(r"--[a-z][a-z0-9-]*", "".join(printed)))


@pytest.fixture(scope="module")
def flags_of():
    """The flags of every command."""
    commands = {
        "train.py": train,
        "eval.py": evaluation,
        "experiments.bench": bench,
        "experiments.plot": plot,
        "experiments.compare": compare,
        "experiments.diagnostics": diagnostics,
        "experiments.figures": figures,
        "experiments.gpu": gpu,
        "experiments.gradients": gradients,
        "experiments.paired": paired,
        "experiments.report": report,
        "experiments.smollm2": smollm2,
        "experiments.stories": stories,
        "experiments.sweep": sweep,
        "experiments.walk": walk,
        "family": lab,
    }
    return {name: flags_in_help(name, module) for name, module in commands.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags(page, flags_of):
    known = set().union(*flags_of.values()) | TORCHRUN | {"--no-"}
    text = re.sub(r"\\\n\s*", "", text_of(page))
    for line in text.splitlines():
        flags = {flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", line)}
        assert flags <= known, line
        command = re.match(
            r"(?:torchrun|python|\.venv/bin/python)\b.*?(train\.py|eval\.py|experiments\.\w+|family\b)",
            line,
        )
        if command:  # a line of a code block: the flags must be those of this command
            assert flags <= flags_of[command[1]] | TORCHRUN, line


def test_the_readme_is_short():
    text = text_of(ROOT / "README.md")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not line.startswith(("|", "    ")))
    assert len(text.splitlines()) <= 175 and len(prose.split()) <= 1500
    assert not re.search(r"\b[A-Z]+_[A-Z]+\b", prose)  # a place left to be filled in


def test_the_readme_says_what_helps_a_reader_to_trust_it():
    """Nothing that nobody tried may pass for tried."""
    text = text_of(ROOT / "README.md")
    for sentence in (
        "No CUDA line has run on a GPU",
        "Nobody has tried vLLM",
        "none of the paper's results were reproduced",
    ):
        assert sentence in " ".join(text.split())


def test_ci_runs_the_readme_s_commands_in_this_order():
    commands = [
        line
        for line in text_of(ROOT / "README.md").splitlines()
        if line.startswith("python3 -m venv")
    ]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert (
        len(commands) == 2
        and [line for line in lines if line in commands] == commands
        and lines[-1] == commands[1]
    )


def test_the_bars_of_the_schematic_follow_from_its_inputs():
    """docs/method.svg: the inputs stand in its comment, the bars are those of token_signals."""
    svg = text_of(ROOT / "docs" / "method.svg")

    def row(name):
        numbers = re.search(rf"\n *{re.escape(name)} +([-\d. ]+)\n", svg)[1]
        return torch.tensor([[float(number) for number in numbers.split()]])

    H, delta = row("H"), row("teacher_logp - student_logp")
    zeros, mask = torch.zeros_like(H), torch.ones_like(H, dtype=torch.bool)
    found = egrsd.token_signals(torch.ones(1), delta, zeros, H, mask, gamma=1.0, window=3, eps=0.2)
    least = egrsd.lookahead_min(H, mask, 3)
    for color, values, scale in (
        ("pale", H, 24),
        ("entropy", least, 24),
        ("neutral", found.magnitude - 1, 100),
        ("gate", found.gate, 46),
        ("plus", found.advantage, 46),
    ):
        path = re.search(f'<path class="{color}" d="([^"]*)"', svg)[1]
        heights = [-float(height) for height in re.findall(r"h40v(-?[\d.]+)h-40z", path)]
        assert heights == pytest.approx((scale * values[0, :7]).tolist(), abs=0.051), color
