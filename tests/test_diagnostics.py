"""experiments.diagnostics against plain loops and transformers' generate, and the page made of its
output."""

import doctest
import html
import html.parser
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from conftest import forked, random_ids, tiny_qwen3
from transformers import AutoModelForCausalLM, AutoTokenizer

import egrsd
import lora
import reward
import rollout
import teacher
import toy
from experiments import diagnostics, report
from family.divergences import per_token_divergence
from support.data import load_problems
from support.flags import parse
from support.report import COLUMNS, token_view
from support.sampling import Rollout


def test_doctests():
    assert doctest.testmod(diagnostics).failed == 0


def test_markers_count_as_the_authors_do_and_by_words():
    found = diagnostics.markers(
        ["Hmm, maybe. Let me CHECK: 2+3=5. Checking again, likely right."], tokens=20
    )
    assert found["markers_per_response"] == 5
    assert found["markers_per_1000_tokens"] == 1000 * 4 / 20  # the word "checking" is no marker


def test_repetition_is_that_of_the_tail():
    prose = " ".join(str(n * n % 977) for n in range(2000))
    assert diagnostics.repetition_rate([prose + "again " * 400]) == 1
    assert diagnostics.repetition_rate(["again " * 400 + prose]) == 0


def test_top_overlap_equals_sets():
    log_t, log_s = (
        torch.randn(9, 61, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
    )
    for i, value in enumerate(diagnostics.top_overlap(log_t, log_s, k=16).tolist()):
        sets = [set(sorted(range(61), key=lambda v: -x[i, v])[:16]) for x in (log_t, log_s)]
        assert value == len(sets[0] & sets[1]) / 16
    assert diagnostics.top_overlap(log_t, log_t).tolist() == [1.0] * 9
    # a vocabulary below k
    assert diagnostics.top_overlap(log_t[:, :5], log_s[:, :5]).tolist() == [1.0] * 9


def test_auroc():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, size=40) / 5.0, rng.random(40) < 0.3
    pairs = [(p, n) for p in scores[labels] for n in scores[~labels]]
    expected = sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs)
    assert diagnostics.auroc(scores, labels) == pytest.approx(expected)
    value, low, high = diagnostics.auroc_interval(scores, labels)
    assert low < value < high and value == diagnostics.auroc(scores, labels)
    assert diagnostics.auroc_interval(labels.astype(float), labels) == [1, 1, 1]
    assert diagnostics.auroc_interval(scores, np.zeros(40, dtype=bool)) is None
    assert math.isnan(diagnostics.auroc(scores, np.ones(40, dtype=bool)))
    # the 95 % are those between the quantiles
    chosen = np.random.default_rng(0).integers(40, size=(2000, 40))
    draws = [diagnostics.auroc(scores[places], labels[places]) for places in chosen]
    assert np.mean([low <= x <= high for x in draws]) == pytest.approx(0.95, abs=0.015)
    assert np.mean([x < low for x in draws]) < 0.03 and np.mean([x > high for x in draws]) < 0.03


def test_the_bootstrap_covers():
    """Of 95 % intervals about 95 % contain the truth: for normal scores one apart it is Phi(1 /
    sqrt 2) = 0.760."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(100):
        labels = np.arange(60) < 20
        _, low, high = diagnostics.auroc_interval(
            rng.normal(size=60) + labels, labels, resamples=200
        )
        hits += low <= 0.7602 <= high
    assert 85 <= hits <= 100


def run(tiny_toy, out, *flags):
    arguments = [
        "--model",
        tiny_toy / "model",
        "--data",
        tiny_toy / "test.jsonl",
        "--out",
        out,
        "--problems",
        12,
        "--samples",
        2,
        "--max-new-tokens",
        12,
        *flags,
    ]
    settings = parse(diagnostics.DiagnosticsSettings, list(map(str, arguments)), "")
    return diagnostics.diagnose(settings)


@pytest.fixture(scope="module")
def diagnosed(tiny_toy, tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("diagnosed") / "out"
    run(
        tiny_toy,
        out,
        "--adapter",
        tiny_run / "checkpoints" / "step-000004" / "adapter",
        "--branches",
        20,
    )
    return out


def test_a_run_adds_up(diagnosed):
    # no NaN
    result = json.loads((diagnosed / "diagnostics.json").read_text(), parse_constant=pytest.fail)
    records = [json.loads(line) for line in (diagnosed / "tokens.jsonl").read_text().splitlines()]
    assert result["completions"] == len(records) == 24 and result["tokens"] == sum(
        len(record["tokens"]) for record in records
    )
    assert sum(part["tokens"] for part in result["deciles"]) == result["tokens"]
    assert sum(kind["share"] for kind in result["kinds"].values()) == pytest.approx(1, abs=1e-6)
    assert all(len(record[name]) == len(record["tokens"]) for record in records for name in COLUMNS)
    H = np.array([x for record in records for x in record["entropy"]])
    assert result["kinds"]["lock"]["share"] == pytest.approx((H < 0.5).mean(), abs=1e-6)
    columns = {name: np.array([x for record in records for x in record[name]]) for name in COLUMNS}
    tenth = np.argsort(-H, kind="stable")[: len(H) // 10]
    assert result["deciles"][9]["entropy"] == pytest.approx(H[tenth].mean(), rel=0.01)
    assert result["deciles"][9]["|d|"] == pytest.approx(
        np.abs(columns["delta"][tenth]).mean(), rel=0.05
    )
    assert result["kinds"]["lock"]["cl_gate"] == pytest.approx(
        columns["gate"][H < 0.5].mean(), abs=1e-3
    )
    assert result["kinds"]["lock"]["gate"] == pytest.approx(
        (1 - 0.3 * H / max(1, H.max()))[H < 0.5].mean(), abs=1e-3
    )
    assert result["kinds"]["lock"]["gate"] < result["kinds"]["lock"]["cl_gate"]
    most = max(1, H.max())
    counts, changes = {name: 0 for name in diagnostics.REGIMES}, []
    for record in records:  # regimes against a loop
        for t, entropy in enumerate(record["entropy"]):
            words = ["uncertain" if entropy >= 0.2 * most else "certain"]
            soon = min(record["entropy"][t + 1 : t + 4], default=0)
            words.append("uncertain" if soon >= 0.2 * most else "certain")
            counts[", then ".join(words)] += 1
            if words == ["uncertain", "certain"]:
                changes.append(record["gate"][t] - (1 - 0.3 * entropy / most))
    for name, found in result["regimes"].items():
        assert found["share"] == pytest.approx(counts[name] / len(H), abs=2 / len(H))
    found = result["regimes"]["uncertain, then certain"]
    assert found["change"] == pytest.approx(np.mean(changes), abs=2e-3) and len(changes) > 5
    for record in records:  # kinds against a loop
        for t, (kind, entropy) in enumerate(zip(record["kind"], record["entropy"], strict=True)):
            assert kind == (
                0 if entropy < 0.5 else 1 if min(record["entropy"][t : t + 4]) < 0.2 else 2
            )
    for record in records:  # the sign of a token's advantage is that of its completion
        assert (
            all(x * record["A"] >= 0 for x in record["advantage"])
            and (record["A"] > 0) == record["correct"]
        )


def test_accuracy_of_the_teacher_is_that_of_its_own_solutions(tiny_toy, tiny_run, tmp_path):
    """Greedily, against transformers' generate without the adapter."""
    adapter = tiny_run / "checkpoints" / "step-000004" / "adapter"
    flags = ["--adapter", adapter, "--temperature", 0, "--branches", 0]
    found = run(tiny_toy, tmp_path / "out", *flags, "--teacher-samples", 1)["teacher_accuracy"]
    model = AutoModelForCausalLM.from_pretrained(tiny_toy / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_toy / "model")
    correct = []
    for p in load_problems(tiny_toy / "test.jsonl")[0][:12]:
        prompt = teacher.encode(tokenizer, teacher.teacher_messages(p.problem, p.solution))
        with torch.no_grad():
            ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
        text = tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
        ended = ids[0, -1] in rollout.stop_ids(model, tokenizer)
        correct.append(bool(ended) and reward.grade(text, p.answer))
    assert found == np.mean(correct) and 0 < found < 1


def test_readings_are_those_of_student_and_teacher(diagnosed, tiny_toy, tiny_run):
    record = json.loads((diagnosed / "tokens.jsonl").read_text().splitlines()[5])
    model, tokenizer = (
        kind.from_pretrained(tiny_toy / "model") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    problem = load_problems(tiny_toy / "test.jsonl")[0][2]
    ids = tokenizer.encode("".join(record["tokens"]))
    assert (
        problem.problem == record["problem"]
        and [tokenizer.decode([i]) for i in ids] == record["tokens"]
    )
    with torch.no_grad():
        privileged = teacher.encode(
            tokenizer, teacher.teacher_messages(problem.problem, problem.solution)
        )
        seen = teacher.read(model, [privileged], [ids])
        lora.load_adapter(model, tiny_run / "checkpoints" / "step-000004" / "adapter")
        own = teacher.read(
            model, [teacher.encode(tokenizer, teacher.student_messages(problem.problem))], [ids]
        )
    assert record["entropy"] == pytest.approx(seen.entropy[0].tolist(), abs=2e-4)
    assert record["delta"] == pytest.approx((seen.logp - own.logp)[0].tolist(), abs=2e-3)


def places_by_generate(record, model, tokenizer):
    """(token, viability of its branches) of a record of tokens.jsonl, greedily: by plain forward
    passes and generate."""
    messages = teacher.teacher_messages(record["problem"], record["solution"])
    privileged = teacher.encode(tokenizer, messages)
    prompt = tokenizer.encode(record["prompt"], add_special_tokens=False)
    ids = tokenizer.encode("".join(record["tokens"]))
    with torch.no_grad():
        p = model(torch.tensor([privileged + ids])).logits[0, len(privileged) - 1 : -1].softmax(-1)
    p[:, tokenizer.eos_token_id] = 0
    for t in range(len(ids)):
        branches = [v for v in p[t].argsort(descending=True).tolist()[:4] if p[t, v] >= 0.02]
        ends = []
        for v in branches if len(branches) >= 2 else []:
            start = torch.tensor([prompt + ids[:t] + [v]])
            end = model.generate(start, max_new_tokens=12, do_sample=False)[
                0, len(prompt) :
            ].tolist()
            text = tokenizer.decode(end, skip_special_tokens=True)
            ends.append(
                float(end[-1] == tokenizer.eos_token_id and reward.grade(text, record["answer"]))
            )
        if ends:
            yield t, ends


def test_ids_without_a_token_are_no_branches(monkeypatch):
    model = tiny_qwen3()
    monkeypatch.setattr(rollout, "stop_ids", lambda *_: [1])
    monkeypatch.setattr(rollout, "unused_ids", lambda *_: unused)
    row = Rollout([5] * 40, [], True, None, [], correct=True)
    hidden = [torch.randn(40, 32, generator=torch.Generator().manual_seed(0))]
    unused = []
    first = {v for _, _, vs in diagnostics.branch_places(model, None, [row], hidden) for v in vs}
    unused = sorted(first)[::2]
    after = {v for _, _, vs in diagnostics.branch_places(model, None, [row], hidden) for v in vs}
    assert unused and after and not after & {*unused}


def test_branch_viability_equals_generate(tiny_toy, tmp_path, monkeypatch):
    """Greedy, every branch ends in one way only: as transformers' generate goes on from it."""
    monkeypatch.setattr(diagnostics, "LEAST_PROBABILITY", 0.02)
    result = run(
        tiny_toy,
        tmp_path / "out",
        "--temperature",
        0,
        "--branches",
        10_000,
        "--problems",
        15,
    )["branches"]
    assert result["positions"] == result["candidates"] > 5
    records = [
        json.loads(line) for line in (tmp_path / "out" / "tokens.jsonl").read_text().splitlines()
    ]
    model, tokenizer = (
        kind.from_pretrained(tiny_toy / "model") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    found = [
        (record, t, ends)
        for record in records
        if record["correct"]
        for t, ends in places_by_generate(record, model, tokenizer)
    ]
    viability = [ends for _, _, ends in found]
    assert len(viability) == result["positions"] and sum(map(len, viability)) == result["branches"]
    assert result["mean_viability"] == pytest.approx(np.mean([x for v in viability for x in v]))
    assert result["unreliable"] == sum(max(v) == 0 for v in viability)
    assert result["benign"] == sum(sum(v) >= 2 for v in viability)
    labels = np.array([max(v) == 0 for v in viability])
    if labels.all() or not labels.any():
        assert set(result["auroc"].values()) == {None}
        return
    scores = {
        "position": [(t + 0.5) / len(record["tokens"]) for record, t, _ in found],
        "entropy": [record["entropy"][t] for record, t, _ in found],
        "|d|": [abs(record["delta"][t]) for record, t, _ in found],
        "lookahead": [min(record["entropy"][t : t + 4]) for record, t, _ in found],
    }
    for name, values in scores.items():
        assert result["auroc"][name][0] == pytest.approx(
            diagnostics.auroc(np.array(values), labels), abs=0.05
        )


def test_overlap_in_a_reading_is_that_of_full_distributions():
    model, completions = tiny_qwen3(), random_ids([6, 3], seed=1)
    by_teacher, by_student = (
        teacher.read(model, random_ids([4, 5], seed=seed), completions, hidden=True)
        for seed in (3, 2)
    )
    found = per_token_divergence(
        model.lm_head,
        by_student.hidden,
        by_teacher.hidden,
        by_student.mask,
        diagnostics.top_overlap,
    )
    logs = [
        model.lm_head(torch.cat(reading.hidden)).log_softmax(-1)
        for reading in (by_teacher, by_student)
    ]
    assert torch.equal(found[by_student.mask], diagnostics.top_overlap(*logs))


@pytest.mark.parametrize(
    "flags,complaint",
    [
        (["--problems", 0], "--problems must be at least 1, got 0"),
        (["--data", ""], "argument --data: it is empty"),
        (["--window"], "expected one argument; see --help"),
        (["--top-p", 0], "--top-p"),
        (["--adapter", "nowhere"], "nowhere: cannot load the adapter"),
        (["--max-new-tokens", 4000], "lower --max-new-tokens"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such data file"),
    ],
)
def test_mistakes_end_in_one_line(tiny_toy, tmp_path, flags, complaint, capsys, monkeypatch):
    arguments = [
        "--model",
        tiny_toy / "model",
        "--data",
        tiny_toy / "test.jsonl",
        "--out",
        tmp_path / "out",
        *flags,
    ]
    monkeypatch.setattr(sys, "argv", ["diagnostics", *map(str, arguments)])
    with pytest.raises(SystemExit, match="1"):
        diagnostics.main()
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("python -m experiments.diagnostics: ") and complaint in message
    assert not (tmp_path / "out").exists()


# ---- the page


class Parsed(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.inside, self.script, self.text = [], [], {}, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop()[0] != tag:
            pass

    def handle_data(self, data):
        if self.inside and self.inside[-1][0] == "script":
            self.script[self.inside[-1][1].get("id", "")] = data
        else:
            self.text += data


def test_the_toy_s_musings_are_markers():
    assert set(diagnostics.MARKERS) >= {word.strip() for word in toy.MUSINGS}


def test_page_is_whole_and_self_contained(diagnosed, tmp_path):
    assert (
        forked(
            tmp_path, report.main, "v", diagnosed / "tokens.jsonl", "--out", tmp_path / "v.html"
        )[0]
        == 0
    )
    text = (tmp_path / "v.html").read_text(encoding="utf-8")
    records = [json.loads(line) for line in (diagnosed / "tokens.jsonl").read_text().splitlines()]
    parsed = Parsed(text)
    assert not {"src", "href"} & {key for _, attributes in parsed.tags for key in attributes}
    assert "url(" not in text and "http" not in text and "prefers-color-scheme: dark" in text
    shown = [{name: record[name] for name in ("tokens", *COLUMNS)} for record in records]
    assert json.loads(parsed.script["data"]) == shown
    # the script takes the spans of a completion for its tokens, and the names of kinds from a list
    boxes = re.findall(r'<div class="completion">(.*?)</div>', text, re.DOTALL)
    for box, record in zip(boxes, records, strict=True):
        spans = [html.unescape(span) for span in re.findall("<span>(.*?)</span>", box, re.DOTALL)]
        assert spans == [token.replace("\n", "\u21b5\n") for token in record["tokens"]]
    assert f"const kinds = {list(egrsd.KINDS)}" in parsed.script[""]
    assert records[0]["problem"] in parsed.text and records[0]["solution"] in parsed.text


def test_page_cannot_be_broken_by_a_completion():
    evil = "</script><script>alert(1)</script><!--"
    record = dict.fromkeys(("problem", "prompt", "solution", "answer"), evil) | dict.fromkeys(
        COLUMNS, [0, 1]
    )
    record |= {"tokens": [evil, "\n"], "correct": True, "reward": 1.0, "A": 0.5}
    parsed = Parsed(token_view([record]))
    assert [attributes.get("id") for tag, attributes in parsed.tags if tag == "script"] == [
        "data",
        None,
    ]
    assert (
        json.loads(parsed.script["data"])[0]["tokens"] == [evil, "\n"]
        and "alert" not in parsed.script[""]
    )


def test_page_refuses_other_files(tmp_path):
    (tmp_path / "other.jsonl").write_text('{"problem": "p"}\n')
    code, lines, _ = forked(tmp_path, report.main, "v", tmp_path / "other.jsonl")
    assert code == 1 and len(lines) == 1 and "not a tokens.jsonl" in lines[0]


def test_saliency_by_kind_and_who_knows_it_against_loops(tiny_toy, tmp_path, monkeypatch):
    """Made-up saliencies of all tokens but the last: equal to a gate's order, and at random."""
    generator = torch.Generator().manual_seed(0)

    def rising(model, tokenizer, rollouts):
        assert all(r.correct for r in rollouts) and len(rollouts) == 5
        return [torch.arange(len(r.token_ids) - 1.0) / 99 for r in rollouts]

    def at_random(model, tokenizer, rollouts):
        return [torch.rand(len(r.token_ids) - 1, generator=generator) for r in rollouts]

    monkeypatch.setattr(diagnostics, "SALIENCY", {"mask": rising, "steps": at_random})
    found = run(tiny_toy, tmp_path / "run", "--branches", 0, "--saliency", 5)["saliency"]
    lines = (tmp_path / "run" / "tokens.jsonl").read_text().splitlines()
    chosen = [record for record in map(json.loads, lines) if record["correct"]][:5]
    assert found["solutions"] == 5 and found["tokens"] == sum(len(x["by_mask"]) for x in chosen)
    assert found["by_mask"]["auroc"]["position"] == pytest.approx([1, 1, 1])
    scores = []
    by_kind = [[], [], []]
    for record in chosen:
        values = record["by_steps"]
        for kind, value in zip(record["kind"], values, strict=False):
            by_kind[kind].append(value)
        middle = sorted(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]
        pairs = list(zip(record["entropy"], values, strict=False))
        more = [H for H, value in pairs if value > sum(middle) / len(middle)]
        less = [H for H, value in pairs if value <= sum(middle) / len(middle)]
        wins = [(a > b) + (a == b) / 2 for a in more for b in less]
        scores.append(sum(wins) / len(wins))
    mean, low, high = found["by_steps"]["auroc"]["entropy"]
    assert mean == pytest.approx(np.mean(scores), abs=1e-3)
    assert high - mean == pytest.approx(1.96 * np.std(scores, ddof=1) / 5**0.5, abs=1e-2)
    for kind, values in zip(egrsd.KINDS, by_kind, strict=True):
        share = found["by_steps"]["kinds"][kind]
        assert share["share"] == pytest.approx(len(values) / found["tokens"], abs=1e-6)
        if values:
            assert share["by_steps"] == pytest.approx(np.mean(values), abs=1e-3)


def test_answers_without_reasoning_rest_on_nothing(tiny_toy, tmp_path):
    found = run(tiny_toy, tmp_path / "run", "--branches", 0, "--saliency", 3)["saliency"]
    assert found == {"solutions": 3, "tokens": 0}
