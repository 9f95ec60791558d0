"""egrsd.ipynb: its cells run from nothing, without jupyter; its exercises know right from wrong; its
outputs are committed."""

import json
import math
from pathlib import Path

import pytest

import egrsd

ROOT = Path(egrsd.__file__).parent
CELLS = json.loads((ROOT / "egrsd.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def names():
    """What is defined after all cells were run."""
    pytest.importorskip("matplotlib").use("Agg")
    names = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for number, cell in enumerate(CODE):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    return names


def test_outputs_are_committed():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {
        "stream",
        "display_data",
        "execute_result",
    }
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert all(output.get("name") != "stderr" for output in outputs)
    text = json.dumps(outputs)
    assert text.count("no answer yet") == 6 and "/home" not in text and "/work" not in text


def test_the_step_is_that_of_the_page(names):
    page = json.loads((ROOT / "results" / "walk.json").read_text())
    assert names["loss"].item() == pytest.approx(page["metrics"]["loss"], abs=1e-4)


def test_it_learns(names):
    before, after = (names[name][2] for name in ("before", "after"))
    assert (after > 0).float().mean() > (before > 0).float().mean() + 0.25
    assert len(names["curve"]) == 40


def test_the_exercises_know_right_from_wrong(names):
    read_again, forks, pivots = names["read_again"], names["forks"], names["pivots"]
    many_H, mask = names["many_H"], names["many_mask"]
    half = 0.5 / (read_again(1.0, 3).least_entropy[forks].mean() / many_H.max()).item()
    rise = (read_again(3.0, 3).gate - read_again(3.0, 0).gate)[pivots].mean().item()
    gates, less = [], 0
    for h, inside, fork in zip(many_H.tolist(), mask.tolist(), forks.tolist(), strict=True):
        h = h[: sum(inside)]
        ahead = [min(h[t : t + 4]) for t in range(len(h))]
        around = [min(h[max(0, t - 3) : t + 4]) for t in range(len(h))]
        top = many_H.max().item()
        gates += [
            max(0.1, 1 - 3 * x / top) for x, is_fork in zip(around, fork, strict=False) if is_fork
        ]
        printed = [max(0.1, 1 - x / max(1, max(ahead))) for x in ahead]
        plain = [max(0.1, 1 - x / max(1, max(h))) for x in h]
        less += sum(a < b - 1e-6 for a, b in zip(printed, plain, strict=True))
    right = {
        1: half,
        2: lambda h, W: [min(h[t : t + W + 1]) for t in range(len(h))],
        3: rise,
        4: sum(gates) / len(gates),
        5: -math.log(1.2),
        6: less / mask.sum().item(),
    }
    wrong = {1: 1.2 * half, 2: lambda h, W: h, 3: rise + 0.05, 4: 0.1, 5: math.log(1.2), 6: 0.0}
    for number in range(1, 7):
        assert names["check"](number, right[number]) == f"exercise {number}: right"
        assert names["check"](number, wrong[number]) == f"exercise {number}: not yet"
        assert names["check"](number, None) == f"exercise {number}: no answer yet"
