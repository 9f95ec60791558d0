"""experiments.gradients against plain autograd, slow loops and known truth."""

import itertools
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_ids, tiny_qwen3

import egrsd
import lora
from experiments import compare, gradients
from experiments.gradients import GradientsSettings
from family import __main__ as lab
from support.data import Problem
from support.sampling import Rollout


def exact_gradient(model, rows, privileged, advantage, **values):
    """Of one configuration: row by row from full logits in float64."""

    def distributions(prompt, completion):
        return (
            model(torch.tensor([prompt + completion]))
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
        )

    mask = torch.zeros(len(rows), max(len(row.token_ids) for row in rows), dtype=torch.bool)
    logp, teacher_logp, entropy = (torch.zeros(mask.shape, dtype=torch.float64) for _ in range(3))
    for i, row in enumerate(rows):
        n, own = len(row.token_ids), distributions(row.prompt, row.token_ids)
        with lora.disabled(model), torch.no_grad():
            seen = distributions(privileged[i], row.token_ids)
        logp[i, :n] = own[range(n), row.token_ids]
        teacher_logp[i, :n] = seen[range(n), row.token_ids]
        entropy[i, :n], mask[i, :n] = -(seen.exp() * seen).sum(-1), True
    weights = egrsd.token_advantages(
        advantage, teacher_logp, logp, entropy, mask, floor=0.2, **values
    )
    loss = egrsd.policy_loss(logp, weights, mask)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, lora.lora_parameters(model))])


@pytest.mark.parametrize("pass_tokens", [20, 1000])
def test_every_gradient_equals_that_of_a_plain_loop(monkeypatch, pass_tokens):
    model = tiny_qwen3(layers=1)
    lora.add_lora(model, 2, 4.0)
    for parameter in lora.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.3)
    model.double()
    lengths = [7, 1, 5, 4]
    privileged, prompts = random_ids([9, 8, 12, 9], seed=1), random_ids([4, 6, 3, 5], seed=2)
    rows = [
        Rollout(ids, [], True, Problem(str(i), "", "", i), prompts[i], reward=r, advantage=a)
        for i, (ids, r, a) in enumerate(
            zip(random_ids(lengths), [1.2, 0.0, 1.4, 0.0], [1.5, -0.5, 2.0, -0.5], strict=True)
        )
    ]
    monkeypatch.setattr(
        gradients, "teacher_prompt", lambda tokenizer, problem, shown, s: privileged[problem.line]
    )
    s = GradientsSettings(
        gamma=[0.3, 2.0], window=[0, 2], eps=[0.6], floor=0.2, sketch=10**6, pass_tokens=pass_tokens
    )
    found, grid = gradients.batch_sketches(model, None, rows, s), gradients.configurations(s)
    assert len(grid) == 2 * (1 + 2 * 2) + 3
    for name, (gamma, window, eps), vector in zip(grid, grid.values(), found, strict=True):
        advantage = {
            "r": [1.2, 0.0, 1.4, 0.0],
            "r - 0.5": [0.7, -0.5, 0.9, -0.5],
            "shorter": [4.25 - length for length in lengths],
        }.get(name, [1.5, -0.5, 2.0, -0.5])
        exact = exact_gradient(
            model, rows, privileged, torch.tensor(advantage), gamma=gamma, window=window, eps=eps
        )
        exact_sketch = gradients.sketch(exact, s.sketch, s.seed)
        torch.testing.assert_close(
            vector, exact_sketch, rtol=0, atol=1e-5 * exact_sketch.abs().max().item()
        )
        assert exact.norm() > 0.1


def test_names_are_those_of_compare():
    grid = gradients.configurations(GradientsSettings())
    assert len(grid) == 43 and {
        "grpo",
        "no gate, eps 0.8",
        "gamma 1.0 W 5, eps 0.4",
        "r",
        "shorter",
    } <= set(grid)
    for name in set(grid) & set(compare.variants()) - {"grpo"}:
        s, *_ = lab.parse_arguments(["--preset", "toy", *compare.variants()[name]])
        assert grid[name] == (s.gamma, s.window if s.gamma else 0, s.eps), name
    # all of its gates and clips, grpo and magnitude off
    assert len(set(grid) & set(compare.variants())) == 18


# ---- figures


GRID = {
    "grpo": (0.0, 0, 0.0),
    "eps 0.5": (0.0, 0, 0.5),
    "gamma 1.0 W 0, eps 0.5": (1.0, 0, 0.5),
    "shorter": (0.0, 0, 0.0),
}


def slow(s, p, shorter):
    """What `estimates` says, by loops over vectors [N, d]."""
    n = len(s)

    def cosine(x, y):
        return x @ y / np.sqrt((x @ x) * (y @ y))

    pairs = list(itertools.permutations(range(n), 2))
    ss, sp, pp = (np.mean([x[a] @ y[b] for a, b in pairs]) for x, y in ((s, s), (s, p), (p, p)))
    power, bias = np.mean([x @ x for x in s]), sp / np.sqrt(ss * pp)
    cosines, toward_shorter = (
        [cosine(s[b], sum(x[other] for other in range(n) if other != b)) for b in range(n)]
        for x in (p, shorter)
    )
    signs = [
        cosine(np.sign(s[b]), sum(p[other] for other in range(n) if other != b)) for b in range(n)
    ]
    return {
        "cosines": cosines,
        "alignment": np.mean(cosines),
        "sign": np.mean(signs),
        "shorter": np.mean(toward_shorter),
        "bias": bias,
        "norm": np.sqrt(power / np.mean([x @ x for x in p])),
        "momentum": bias * np.sqrt(ss / (ss + (power - ss) / 19)),
    }


def test_figures_equal_slow_loops():
    rng = np.random.default_rng(0)
    vectors = 0.5 + rng.normal(size=(4, 6, 40))
    rows = gradients.summarise(torch.tensor(vectors), GRID, True)
    assert list(rows) == sorted(rows, key=lambda name: -rows[name]["sign"][0])
    without_signs = gradients.summarise(torch.tensor(vectors), GRID, False)
    assert list(without_signs) == sorted(rows, key=lambda name: -rows[name]["alignment"][0])
    for name, s in zip(GRID, vectors, strict=True):

        def values(kept, name=name, s=s):
            own, plain, ungated = (
                slow(x[kept], vectors[0][kept], vectors[3][kept]) for x in (s, *vectors[:2])
            )
            rivals = {
                "- grpo": own["alignment"] - plain["alignment"],
                "- gamma 0": own["alignment"]
                - (plain if name in ("grpo", "shorter") else ungated)["alignment"],
            }
            return own | rivals

        whole = values(list(range(6)))
        left = [values([k for k in range(6) if k != b]) for b in range(6)]
        plain = vectors[0]
        cosines = gradients.alignments(s @ s.T, s @ plain.T, plain @ plain.T)
        assert cosines == pytest.approx(whole.pop("cosines"))
        assert rows[name].keys() == whole.keys()
        for key, value in whole.items():
            error = np.sqrt(
                5 / 6 * sum((x[key] - np.mean([y[key] for y in left])) ** 2 for x in left)
            )
            assert rows[name][key] == pytest.approx([value, error], abs=1e-9), key


def test_a_batch_is_compared_with_the_others_only():
    s, p = np.random.default_rng(0).normal(size=(2, 5, 20))
    before = gradients.alignments(s @ s.T, s @ p.T, p @ p.T)
    p[2] = 1000.0  # the plain gradient of batch 2
    after = gradients.alignments(s @ s.T, s @ p.T, p @ p.T)
    assert after[2] == pytest.approx(before[2]) and abs(after[1] - before[1]) > 0.01


def test_noise_and_errors_are_those_of_known_directions():
    """E p = e, E s = 0.8 e + 0.6 f with noise in common: the estimates hit the truth, and the
    jackknife hits their spread over 100 repetitions."""
    rng, found = np.random.default_rng(0), []
    for _ in range(100):
        noise, own = rng.normal(size=(2, 12, 300)) / np.sqrt(300)
        p, s = 2 * noise, 2 * noise + 0.5 * own
        p[:, 0], s[:, 0], s[:, 1] = p[:, 0] + 1, s[:, 0] + 0.8, s[:, 1] + 0.6
        row = gradients.summarise(torch.tensor(np.stack([p, s, s, p])), GRID, False)["eps 0.5"]
        found.append([row[key] for key in ("bias", "momentum", "alignment", "- grpo")])
    values, errors = np.moveaxis(np.array(found), 2, 0)
    truth = [0.8, 0.8 / np.sqrt(1 + 4.25 / 19)]
    assert values.mean(0)[:2] == pytest.approx(truth, abs=0.01)
    assert np.sqrt((errors**2).mean(0)) == pytest.approx(values.std(0), rel=0.3)


def test_noise_that_outweighs_the_signal_is_told():
    # products of different batches are negative
    vectors = torch.eye(4).double() - 0.3 * torch.ones(4, 4)
    row = gradients.summarise(torch.stack([vectors] * 4), GRID, False)["eps 0.5"]
    assert row["bias"] == row["momentum"] == [None, None]
    result = {
        "accuracy": 0,
        "length": 1,
        "coordinates": 4,
        "sketch_error": 0.5,
        "rows": {"grpo": row},
    }
    line = gradients.gradients_table(result).splitlines()[-1].split(" | ")
    assert line[3] == line[4] == "-" and line[6].startswith("+0.000 +- ")


# ---- sketches


def test_sketches_are_linear_and_exact_where_there_is_room():
    x, y = torch.randn(2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for size in (7, 99, 100, 1000):
        sx, sy = (gradients.sketch(v, size, seed=3) for v in (x, y))
        assert len(sx) == min(size, 100)
        torch.testing.assert_close(gradients.sketch(2 * x - y, size, seed=3), 2 * sx - sy)
        if size >= 100:
            torch.testing.assert_close(torch.stack([sx @ sy, sx @ sx]), torch.stack([x @ y, x @ x]))


def test_alignment_on_sketches_is_exact_to_half_a_percent():
    """Of gradients that are much longer than their sketches."""
    vectors = torch.randn(4, 8, 300_000, generator=torch.Generator().manual_seed(0)) + 0.5
    vectors[1:] += vectors[0] / 2
    kept = torch.stack(
        [torch.stack([gradients.sketch(x, 2**16, 0) for x in batches]) for batches in vectors]
    )
    assert kept.shape == (4, 8, 2**16)
    exact, found = (gradients.summarise(x, GRID, False) for x in (vectors, kept))
    for name, row in exact.items():
        assert 0.3 < row["alignment"][0] == pytest.approx(found[name]["alignment"][0], abs=0.005)


def test_products_of_sketches_are_unbiased():
    """And a cosine of long vectors has a standard error below 1 / sqrt(size)."""
    x, y = torch.randn(2, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y[::8] += 3 * x[::8]  # large coordinates one chunk apart: without turns they would meet
    sketches = [[gradients.sketch(v, 8, seed) for v in (x, y)] for seed in range(500)]
    products = torch.stack([a @ b for a, b in sketches])
    assert abs(products.mean() - x @ y) < 3 * products.std() / 500**0.5
    scale = (x.norm() * y.norm()).item()
    assert products.std() / scale < (1 + (x @ y / scale) ** 2) ** 0.5 / 8**0.5 * 1.1


# ---- the command


FLAGS = [
    "--batches",
    3,
    "--batch",
    8,
    "--max-new-tokens",
    12,
    "--gamma",
    0.3,
    1,
    "--window",
    3,
    "--eps",
    0.2,
]


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gradients", *map(str, flags)])
    gradients.main()


def test_command(tiny_toy, tiny_run, tmp_path, monkeypatch, capsys):
    run(
        monkeypatch,
        "--model",
        tiny_toy / "model",
        "--data",
        tiny_toy / "train.jsonl",
        *FLAGS,
        "--teacher-context",
        "answer",
        "--adapter",
        tiny_run / "checkpoints" / "step-000004" / "adapter",
        "--out",
        tmp_path / "g.json",
    )
    result = json.loads((tmp_path / "g.json").read_text(), parse_constant=pytest.fail)
    assert set(result["rows"]) == {
        "grpo",
        "direction-aware",
        "cl-egrsd",
        "magnitude off",
        "gamma 1.0 W 3",
        "gamma 1.0 W 3, eps 0",
        "r",
        "r - 0.5",
        "shorter",
    }
    assert (
        0 < result["accuracy"] < 1
        and 1 < result["length"] <= 12
        and result["settings"]["batch"] == 8
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == gradients.recommendation(result["rows"])
    assert [line.split(" | ")[0][2:] for line in lines[6:]] == list(result["rows"])
    signs = [row["sign"][0] for row in result["rows"].values()]
    assert signs == sorted(signs, reverse=True)


def test_recommendation_names_the_best_gate_or_none():
    def row(alignment, error, more, its_error, sign):
        return {
            "alignment": [alignment, error],
            "- grpo": [more, its_error],
            "- gamma 0": [0.03, 0.01],
            "sign": [sign, 0.01],
        }

    rows = {
        "r": row(0.6, 0.1, 0.3, 0.01, 0.9),
        "eps 0.9": row(0.5, 0.1, 0.12, 0.07, 0.4),
        "eps 0.7": row(0.45, 0.1, 0.11, 0.02, 0.2),
        "eps 0.5": row(0.4, 0.1, 0.1, 0.02, 0.3),
        "grpo": row(0.3, 0.1, 0.0, 0.0, 0.1),
    }
    found = gradients.recommendation(rows)
    assert (
        found.startswith("try eps 0.5: of the 2 gates and clips, of 4,")
        and "+0.100 +- 0.020 above grpo's" in found
    )
    without = {
        name: {key: x for key, x in row.items() if key != "sign"} for name, row in rows.items()
    }
    assert gradients.recommendation(without).startswith(
        "try eps 0.7: of the 2 gates and clips, of 4,"
    )
    for name in ("eps 0.5", "eps 0.7"):
        rows[name]["- grpo"] = [0.1, 0.06]
    assert (
        "is above grpo by two standard errors, which are up to 0.140 here"
        in gradients.recommendation(rows)
    )
    rows["grpo"]["alignment"] = [0.3, 0.2]  # as where all rewards are equal
    assert gradients.recommendation(rows).startswith("no recommendation: the plain gradients")


def test_sketches_do_as_exact_gradients_on_the_toy_s_model(tiny_toy):
    s = GradientsSettings(
        model=str(tiny_toy / "model"),
        data=str(tiny_toy / "train.jsonl"),
        batches=3,
        batch=8,
        max_new_tokens=12,
        gamma=[1.0],
        window=[0],
        eps=[0.8],
    )
    kept, exact = (gradients.measure(replace(s, sketch=size)) for size in (2**16, s.sketch))
    assert (
        kept["sketch_error"] == 2**-8 and exact["sketch_error"] == 0 and kept["coordinates"] > 2**16
    )
    for name, row in exact["rows"].items():
        assert row["alignment"][0] == pytest.approx(
            kept["rows"][name]["alignment"][0], abs=0.005
        ), name


@pytest.mark.parametrize(
    "flags,complaint",
    [
        (["--batches", 2], "--batches must be at least 3, got 2"),
        (["--eps", 0.2, 1], "--eps must be below 1, got 1.0"),
        (["--window", -1], "--window must be at least 0, got -1"),
        (["--gamma", "nan"], "--gamma must be at least 0, got nan"),
        (["--gamma", "x"], "argument --gamma"),
        (["--out", "."], ".: cannot be read or written"),
        (["--out", "no/g.json"], "no/g.json: cannot be read or written"),
        (["--adapter", "nowhere"], "nowhere: cannot load the adapter"),
        (["--data", "nowhere.jsonl"], "no such data file"),
        (["--max-new-tokens", 10**6], "lower --max-new-tokens"),
    ],
)
def test_mistakes_end_in_one_line(tiny_toy, flags, complaint, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, "--model", tiny_toy / "model", "--data", tiny_toy / "train.jsonl", *flags)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("python -m experiments.gradients: ") and complaint in message
