"""experiments.compare and experiments.plot: the rules by which numbers become tables."""

import doctest
import json
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import compare, plot
from family import __main__ as lab
from support.errors import InputError

ROOT = Path(compare.__file__).parent.parent


def test_doctests():
    assert doctest.testmod(compare).failed == 0


def test_interval_is_student_s_t():
    pytest.importorskip("scipy")
    found = compare.interval([0.8, 0.9, 0.85, 0.95, 0.7])
    assert found["mean"] == pytest.approx(0.84)
    error = np.std([0.8, 0.9, 0.85, 0.95, 0.7], ddof=1) / 5**0.5
    assert found["half_width"] == pytest.approx(2.776445 * error, rel=1e-5)
    assert compare.interval([0.5])["half_width"] is compare.interval([0.5])["p"] is None
    assert compare.interval([0.0, 0.0])["p"] == 1 and compare.interval([0.1, 0.1])["p"] == 0


def test_p_value_is_that_of_the_interval():
    """An interval of 1 - p that just reaches 0."""
    stats = pytest.importorskip("scipy.stats")
    values = [0.3, 0.1, 0.4, -0.1, 0.2, 0.35, 0.0, 0.15]
    t = stats.t.ppf(1 - compare.interval(values)["p"] / 2, 7)
    half = t * np.std(values, ddof=1) / 8**0.5
    assert half == pytest.approx(np.mean(values), rel=1e-4)


def arguments(tmp_path, *flags):
    paths = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    return compare.parse_arguments([*paths, *map(str, flags)])


RECORDED = ("compare", "compare_asked", "compare_reconstructed", "compare_shipped")


def recorded(name):
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_learning_rates_are_those_of_the_recorded_rows(tmp_path, name):
    for row, values in recorded(name)["rows"].items():
        assert compare.rate_of(row, arguments(tmp_path)) == values["rate"], row
        if row != compare.BASE:
            assert compare.rate_of(row, arguments(tmp_path, "--lr", "0.5")) == 0.5


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_intervals_and_p_values_are_those_of_today(name):
    """From the recorded values of every seed, to the digits that the tables print."""
    pytest.importorskip("scipy")
    results = recorded(name)
    by_name = {}
    for row, cells in results["rows"].items():
        measures = [measure for measure in compare.MEASURES if measure in cells]
        by_name[row] = {
            seed: {"rate": cells["rate"], "command": cells["command"]}
            | {measure: cells[measure]["values"][place] for measure in measures}
            for place, seed in enumerate(cells["seeds"])
        }
    rows, found = compare.summarise(by_name), compare.answers(by_name)
    assert compare.methods_table(rows) == compare.methods_table(results["rows"])
    assert compare.questions_table(found) == compare.questions_table(results["questions"])
    for new, old in zip(found, results["questions"], strict=True):
        for area in compare.AREAS:
            assert new[area]["p"] == pytest.approx(old[area]["p"], rel=2e-3, abs=1e-6)
            assert new[area]["holm"] == pytest.approx(old[area]["holm"], rel=2e-3, abs=1e-6)


def test_every_run_has_the_same_number_of_rollouts(tmp_path):
    """... and python -m family takes its flags, none of which is without effect."""
    a = arguments(tmp_path)
    for name in compare.variants():
        run, *_ = lab.parse_arguments(compare.flags(name, a))
        run.check()
        assert run.prompts_per_step * run.rollouts_per_prompt == 32 and run.steps == 40
        assert run.method == name or name not in compare.methods()


def test_order_of_the_table():
    """A method that is added later comes last."""
    path = ROOT / "results" / "compare.json"
    if not path.exists():
        pytest.skip("no recorded comparison")
    recorded = json.loads(path.read_text())
    assert compare.methods()[: len(recorded["methods"])] == recorded["methods"]
    assert list(recorded["rows"]) == [
        compare.BASE,
        *(name for name in compare.variants() if name in recorded["rows"]),
    ]


def test_jobs(tmp_path, monkeypatch):
    """Rows of questions with all seeds, others with fewer."""
    pytest.importorskip("scipy")
    seen = []

    def run_all(jobs, a):
        seen.extend(jobs)
        return [result(name, seed, 0.2) for name, seed in jobs]

    monkeypatch.setattr(compare, "run_all", run_all)
    monkeypatch.setattr(compare, "make_splits", lambda a: None)
    monkeypatch.setattr(
        sys, "argv", ["compare", "--only", "opsd", "magnitude off", "--work", str(tmp_path)]
    )
    compare.main()
    few = range(5)
    assert sorted(seen) == sorted(
        [(compare.BASE, seed) for seed in range(20)]
        + [("opsd", seed) for seed in few]
        + [("magnitude off", seed) for seed in range(20)]
    )
    written = json.loads((tmp_path / "only.json").read_text())  # not over the recorded comparison
    assert written["command"] == "python -m experiments.compare" and written["settings"][
        "seeds"
    ] == [*range(20)]
    assert (
        list(written["rows"]) == [compare.BASE, "opsd", "magnitude off"]
        and "magnitude off" in written["curves"]
    )
    assert written["rows"]["opsd"]["seeds"] == [*few] and written["questions"] == []


def test_without_scipy_no_run_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    monkeypatch.setattr(compare, "run_all", lambda *_: pytest.fail("ran"))
    monkeypatch.setattr(compare, "make_splits", lambda a: None)
    monkeypatch.setattr(
        sys, "argv", ["compare", "--work", str(tmp_path / "work"), "--only", "grpo"]
    )
    with pytest.raises(SystemExit, match="1"):
        compare.main()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.endswith(": pip install -r experiments/requirements.txt\n")


def test_every_question_is_about_rows_that_exist():
    asked = {name for pair in compare.QUESTIONS for name in pair.split(" - ")}
    assert len(asked) > 10
    assert asked <= compare.variants().keys()


@pytest.mark.parametrize(
    "name, complaint",
    [("short", "1 problems, --validation takes 480"), ("none", "none.jsonl: cannot be read")],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, capsys, name, complaint):
    (tmp_path / "short.jsonl").write_text("one problem\n")
    monkeypatch.setattr(
        sys, "argv", ["compare", "--work", str(tmp_path), "--data", str(tmp_path / f"{name}.jsonl")]
    )
    with pytest.raises(SystemExit, match="1"):
        compare.main()
    message = capsys.readouterr().err
    assert message.startswith("python -m experiments.compare: ") and complaint in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("text", ["x", "[]", '{"rows": {"sft": {}}}'])
def test_results_of_other_rows_are_not_written_over(tmp_path, text):
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(InputError, match="with rows that these runs do not have"):
        compare.compare(arguments(tmp_path, "--only", "grpo", "grpo", "--seeds", 3, 3))
    assert (tmp_path / "out.json").read_text() == text and not (tmp_path / "work").exists()


def test_rows_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(InputError, match="no rows {'opds'}"):
        arguments(tmp_path, "--only", "grpo", "opds")


def test_nothing_is_run_twice(tmp_path):
    a = arguments(tmp_path, "--only", "grpo", "grpo", "--seeds", 3, 4, 3)
    assert a.only == ["grpo"] and a.seeds == [3, 4]


def result(name, seed, accuracy):
    return {
        "name": name,
        "seed": seed,
        "rate": 1e-3,
        "command": "c",
        "accuracy": accuracy,
        "length": 30.0,
        "eff": 2.0,
        "markers_per_response": 1.0,
        "markers_per_1000_tokens": 2.0,
        "repetition": 0.0,
        "curves": {},
        "mean_accuracy": accuracy,
        "mean_reward": 1.5 * accuracy,
        "mean_length": 40 - seed,
    }


def by_name(accuracies):
    return {
        name: {seed: result(name, seed, value) for seed, value in enumerate(values)}
        for name, values in accuracies.items()
    }


def test_differences_are_taken_seed_by_seed():
    pytest.importorskip("scipy")
    runs = by_name({"cl-egrsd": [0.8, 0.6], "grpo": [0.7, 0.5, 0.1]})
    rows = compare.summarise(runs)
    found = rows["grpo"]["cl-egrsd minus this"]["mean_accuracy"]
    assert found["values"] == [0.1, 0.1] and found["half_width"] == pytest.approx(0, abs=1e-9)
    assert "cl-egrsd minus this" not in rows["cl-egrsd"]
    assert (
        "| cl-egrsd | 0.001 | 2 | 70.0 ± 127.1 | 30.0 ± 0.0 | 2 ± 0 | 1.00 ± 0.00 | 70.0"
        in compare.methods_table(rows)
    )


def test_answers_are_adjusted_for_their_number():
    pytest.importorskip("scipy")
    runs = by_name(
        {"direction-aware": [0.8, 0.82, 0.79], "grpo": [0.7, 0.7, 0.7], "egrsd": [0.81, 0.80, 0.80]}
    )
    found = compare.answers(runs)
    assert [row["difference"] for row in found] == [
        "direction-aware - grpo",
        "egrsd - direction-aware",
        "egrsd - grpo",
    ]
    p = [row[area]["p"] for row in found for area in compare.AREAS]
    assert [row[area]["holm"] for row in found for area in compare.AREAS] == compare.holm(p)
    for values in ([0.001, 0.02, 0.02, 0.9], [0.5, 0.6]):  # against the definition
        order = sorted(range(len(values)), key=values.__getitem__)
        steps = [
            min(1, max((len(values) - k) * values[order[k]] for k in range(place + 1)))
            for place in range(len(values))
        ]
        assert [compare.holm(values)[i] for i in order] == pytest.approx(steps)
    assert (
        "| whole method | egrsd - grpo | +10.3 ± 1.4 * | +0.155 ± 0.022 * |"
        in compare.questions_table(found)
    )


def test_a_run_is_made_once_and_says_how(tiny_toy, tmp_path, monkeypatch):
    a = arguments(
        tmp_path,
        "--model",
        tiny_toy / "model",
        "--data",
        tiny_toy / "train.jsonl",
        "--test",
        tmp_path / "work" / "validation.jsonl",
        "--steps",
        1,
        "--max-new-tokens",
        12,
        "--validation",
        50,
    )
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [])  # which the run sets, as it does these
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    compare.make_splits(a)
    train, validation = ((a.work / f"{name}.jsonl").read_text() for name in ("train", "validation"))
    assert (
        train + validation == (tiny_toy / "train.jsonl").read_text()
        and validation.count("\n") == 50
    )
    first = compare.run("grpo", 0, a)
    assert 0 < first["accuracy"] < 1 and len(first["curves"]["reward"]) == 1
    assert first["mean_reward"] == first["curves"]["reward"][0]
    assert "--method grpo --lr 0.001 --seed 0" in first["command"]
    out = a.work / "grpo" / "lr0.001-seed0"
    samples = (out / "test" / "samples.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["correct"] for line in samples) / 50 == first["accuracy"]
    trained = (out / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert compare.run("grpo", 0, a) == first
    (out / "test.json").write_text('{"na')  # damaged
    assert compare.run("grpo", 0, a) == first
    a.test = str(tiny_toy / "test.jsonl")
    other = compare.run("grpo", 0, a)  # the same model on other problems
    assert other["data"] != first["data"]
    assert (out / "run" / "metrics.jsonl").stat().st_mtime_ns == trained
    a.steps = 2  # other settings, another run

    def train_again():
        assert sys.argv[sys.argv.index("--steps") + 1] == "2"
        sys.exit("trains again")

    monkeypatch.setattr(compare.lab, "main", train_again)
    with pytest.raises(InputError, match="the run ended with code trains again"):
        compare.run("grpo", 0, a)


def test_a_recorded_comparison_is_that_of_the_documentation():
    """The tables of results/*.md are those that the recorded results give."""
    path = ROOT / "results" / "compare.json"
    if not path.exists():
        pytest.skip("no recorded comparison")
    results = json.loads(path.read_text())
    documentation = (ROOT / "results" / "compare.md").read_text(encoding="utf-8")
    for line in [
        *compare.methods_table(results["rows"]).splitlines(),
        *compare.questions_table(results["questions"]).splitlines(),
    ]:
        assert line in documentation
    gradients = recorded_gradients()
    documentation = (ROOT / "results" / "gradients.md").read_text(encoding="utf-8")
    for line in gradients_table(
        results["rows"], {time: file["rows"] for time, file in gradients.items()}
    ):
        assert line in documentation


def test_recorded_rank_correlations_are_those_of_the_documentation():
    """But for their intervals, which take many resamples."""
    pytest.importorskip("scipy")
    documentation = (ROOT / "results" / "gradients.md").read_text(encoding="utf-8")
    tables = plot.correlation_tables(
        *plot.shared_rows(recorded("compare"), recorded_gradients()), resamples=2
    )
    assert tables.count("\n") == 42
    for line in tables.splitlines():
        cells = [re.escape(cell.split("[")[0]) for cell in line.split(" | ")]
        assert not line or re.search(r"[^|]*\| ".join(cells), documentation)


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_rank_correlations_by_hand():
    """Ties have their mean rank; where all values are equal there is no correlation."""
    pytest.importorskip("scipy")
    x = np.array([1.0, 2.0, 3.0, 4.0])
    y = np.array([[10.0, 1.0, 5.0], [30.0, 1.0, 5.0], [20.0, 2.0, 5.0], [40.0, 2.0, 5.0]])
    # [rows, seeds, areas]
    cells = plot.correlations(x, np.stack([y - 1e-12, y + 1e-12], axis=1), resamples=50)
    assert [cell.split(" ")[0] for cell in cells] == ["+0.80", "+0.89", "+0.00"]


def test_pictures(tmp_path, monkeypatch, capsys):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.setattr(plot, "correlation_tables", lambda *_: "the tables")
    argv = ["plot", "--results", str(ROOT / "results" / "compare.json"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    plot.main()
    printed = capsys.readouterr().out
    assert printed.startswith("the tables\n")
    for name in ("frontier.png", "curves.png", "alignment.png"):
        assert (tmp_path / name).stat().st_size > 20_000 and name in printed


def test_rows_that_failed_are_named_but_not_drawn():
    pytest.importorskip("matplotlib").use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = {"no training": 0.4, "sft": 0.9, "lost": 0.19, "kept": 0.21}
    rows = {
        name: {
            "accuracy": {"mean": value, "half_width": 0.01},
            "length": {"mean": 100 * value, "half_width": 1.0},
        }
        for name, value in figures.items()
    }
    _, axes = pyplot.subplots()
    plot.draw_methods(axes, rows)
    points = [tuple(bars.lines[0].get_xydata()[0]) for bars in axes.containers]
    assert points == [(40, 0.4), (90, 0.9), (21, 0.21)]
    assert axes.get_title().endswith(": lost")
    assert [text.get_text() for text in axes.texts] == ["no training", "sft"]
    pyplot.close()


def test_curves_of_several_runs_have_an_interval(monkeypatch):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib").use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot.Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    low, high = ({key: [value] * 5 for key in ("accuracy", "length")} for value in (0.4, 0.6))
    plot.draw_curves({"one": [low], "both": [low, high]}, "none", ["one", "both"])
    for axes in drawn[0].axes:
        assert [list(line.get_ydata()) for line in axes.lines] == [[0.4], [0.5]]
        spreads = [np.ptp(band.get_datalim(axes.transData).intervaly) for band in axes.collections]
        assert spreads == pytest.approx([0, 2 * 12.706 * 0.1], abs=1e-3)
        names = [text.get_text() for text in axes.get_legend().get_texts()]
        assert names == ["both", "one"]  # as the lines end


def test_the_recorded_rows_that_need_more_are_those_of_the_documentation():
    rows, gradients = (
        json.loads((ROOT / "results" / f"{name}_asked.json").read_text())["rows"]
        for name in ("compare", "gradients")
    )
    trained = json.loads((ROOT / "results" / "compare.json").read_text())["rows"] | rows
    documentation = (ROOT / "results" / "compare_asked.md").read_text(encoding="utf-8")
    for line in compare.methods_table(rows).splitlines():
        assert line in documentation
    for name, row in gradients.items():
        cells = [
            f"{row[key][0]:{sign}.3f} ± {row[key][1]:.3f}"
            for key, sign in (
                ("alignment", ""),
                ("- grpo", "+"),
                ("sign", ""),
                ("shorter", "+"),
                ("bias", ""),
                ("norm", ""),
            )
        ]
        if "mean_accuracy" in trained.get(name, {}):
            cells.append(f"{100 * trained[name]['mean_accuracy']['mean']:.1f}")
        assert f"| {' | '.join([name, *cells])} | " in documentation.replace("\n", " ")


def test_the_page_of_the_reconstructed_methods_has_the_recorded_numbers():
    results = recorded("compare_reconstructed")
    page = (ROOT / "results" / "compare_reconstructed.md").read_text(encoding="utf-8")
    tables = compare.methods_table(results["rows"]), compare.questions_table(results["questions"])
    for line in "\n".join(tables).splitlines():
        assert line in page


def recorded_gradients():
    return {time: recorded(f"gradients_{time}") for time in plot.TIMES}


COLUMNS = [
    ("start", "alignment", ""),
    ("start", "- gamma 0", "+"),
    ("middle", "alignment", ""),
    ("end", "alignment", ""),
    ("start", "sign", ""),
    ("start", "shorter", "+"),
    ("middle", "shorter", "+"),
    ("end", "shorter", "+"),
    ("start", "bias", ""),
]


def gradients_table(trained, gradients):
    """Of the rows that were trained too, and two more baselines."""
    for name in gradients["start"]:
        if name in trained or name.startswith("r"):
            cells = [
                "{0:{2}.3f} ± {1:.3f}".format(*gradients[time][name][key], sign)
                for time, key, sign in COLUMNS
            ]
            reward = f"{trained[name]['mean_reward']['mean']:.3f}" if name in trained else ""
            yield f"| {' | '.join([name, *cells, reward])} |"
