"""family/saliency.py against whole sequences in float64, and against loops."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import family_here, tiny_hybrid, tiny_qwen3

import teacher
import toy
from family import saliency
from support import run
from support.data import Problem, load_model
from support.errors import InputError
from support.sampling import Rollout

TEXTS = (
    "7+5=12. Then 12+9=21. It is \\boxed{21}",
    "hmm perhaps 1+1=2.\nwait, so it is 2. So \\boxed{ 2 }. Done",
    "\\boxed{34}",
)


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    model = tiny_qwen3(vocab_size=len(tokenizer)).double()
    return model


def correct_rollout(tokenizer, text, prompt=(5, 6, 7)):
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    one = Rollout(ids, [0.0] * len(ids), True, Problem("", "", "", 1), list(prompt))
    return one.grade(text)


@pytest.fixture(scope="module")
def rollouts(tokenizer):
    prompts = ([5, 6, 7], [8, 9], [3, 4, 5, 6])
    return [correct_rollout(tokenizer, text, p) for text, p in zip(TEXTS, prompts, strict=True)]


def answer_in_one_pass(model, tokenizer, one, scores):
    """log p of the answer from the whole sequence, with a mask of its own: a loop over all pairs of
    tokens."""
    n = len(one.prompt)
    box = n + saliency.box_of(tokenizer, one)
    ids = one.prompt + one.token_ids
    rows = []
    for query in range(len(ids)):
        row = []
        for key in range(len(ids)):
            value = torch.tensor(0.0 if key <= query else -math.inf, dtype=torch.double)
            if query >= box and n <= key < box:
                value = value + scores[key - n]
            row.append(value)
        rows.append(torch.stack(row))
    mask = torch.stack(rows)[None, None]
    logp = model(input_ids=torch.tensor([ids]), attention_mask=mask).logits[0].log_softmax(-1)
    return sum(logp[t - 1, ids[t]] for t in range(box + 1, len(ids)))


def test_the_answer_begins_with_the_last_box(tokenizer, rollouts):
    found = []
    for one in rollouts:
        box = saliency.box_of(tokenizer, one)
        parts = (one.token_ids[:box], one.token_ids[box : box + 1])
        found.append([tokenizer.decode(ids) for ids in parts])
    assert found == [
        ["7+5=12. Then 12+9=21. It is ", "\\boxed{"],
        ["hmm perhaps 1+1=2.\nwait, so it is 2. So ", "\\boxed{"],
        ["", "\\boxed{"],
    ]
    two = correct_rollout(tokenizer, "1+1=2. \\boxed{3} no, \\boxed{2}")
    box = saliency.box_of(tokenizer, two)
    assert tokenizer.decode(two.token_ids[:box]).endswith("no, ")


def test_loss_and_gradient_equal_those_of_whole_sequences(model, tokenizer, rollouts):
    """Three rows of different lengths together, from the cache, against one pass each without."""
    answers = saliency.Answers(model, tokenizer, rollouts)
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(answers.is_reasoning.shape, generator=generator, dtype=torch.double)
    scores.requires_grad_()
    loss = answers.loss(scores * answers.is_reasoning)
    (slopes,) = torch.autograd.grad(loss, scores)
    expected = 0.0
    for i, one in enumerate(rollouts):
        own = scores[i][answers.is_reasoning[i]].detach().requires_grad_()
        logp = answer_in_one_pass(model, tokenizer, one, own)
        expected -= logp.item()
        if len(own):
            (slope,) = torch.autograd.grad(-logp, own)
            found = slopes[i][answers.is_reasoning[i]]
            torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-6)
            assert slope.abs().max() > 1e-3
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_updates_equal_those_of_adamw_written_out(model, tokenizer, rollouts, monkeypatch):
    """Numbers from -0.4 on, times 10, never above 0; 1 - h over the first at the end. At this rate a number
    reaches 0, and others stay suppressed."""
    monkeypatch.setattr(saliency, "UPDATES", 4)
    monkeypatch.setitem(saliency.ADAMW, "lr", 0.15)
    found = saliency.by_mask(model, tokenizer, rollouts)
    for one, values in zip(rollouts, found, strict=True):
        box = saliency.box_of(tokenizer, one)
        H = torch.full((box,), -0.4, dtype=torch.double)
        m, v = torch.zeros(2, box, dtype=torch.double)
        for step in range(1, 5):
            H.requires_grad_()
            loss = -answer_in_one_pass(model, tokenizer, one, 10 * H)
            (slope,) = torch.autograd.grad(loss, H) if box else (H,)
            m = 0.6 * m + 0.4 * slope
            v = 0.9999 * v + 0.0001 * slope**2
            ahead = (m / (1 - 0.6**step)) / ((v / (1 - 0.9999**step)).sqrt() + 1e-8)
            H = ((1 - 0.15 * 0.05) * H.detach() - 0.15 * ahead).clamp(max=0)
        assert values.shape == (box,)
        torch.testing.assert_close(values.double(), (1 + H / 0.4).clamp(min=0), rtol=0, atol=1e-4)
    both = torch.cat(found)
    assert (both == 0).any() and (both == 1).any() and ((both > 0.1) & (both < 0.9)).any()


def test_a_step_left_out_equals_a_text_without_it(model, tokenizer, rollouts):
    """Share of the answer's probability that is lost, one pass for each text."""

    def probability(one, ids, count):
        whole = torch.tensor([one.prompt + ids])
        logp = model(input_ids=whole).logits[0].log_softmax(-1)
        n = whole.shape[1]
        return math.exp(sum(logp[t - 1, whole[0, t]] for t in range(n - count, n)))

    found = saliency.by_steps(model, tokenizer, rollouts)
    steps = (
        ["7+5=12. ", "Then 12+9=21. ", "It is "],
        ["hmm perhaps 1+1=2.", "\nwait, so it is 2. ", "So "],
        [],
    )
    for one, values, texts in zip(rollouts, found, steps, strict=True):
        box = saliency.box_of(tokenizer, one)
        count = len(one.token_ids) - box - 1
        whole = probability(one, one.token_ids, count)
        start = 0
        for text in texts:
            texts_by_length = [tokenizer.decode(one.token_ids[start:end]) for end in range(99)]
            n = texts_by_length.index(text) - start
            rest = one.token_ids[:start] + one.token_ids[start + n :]
            lost = max(0.0, 1 - probability(one, rest, count) / whole)
            assert values[start : start + n].tolist() == pytest.approx([lost] * n, abs=1e-5)
            start += n
        assert len(values) == start == box
    assert 0 < torch.cat(found).mean() < 1


@pytest.mark.parametrize("kind", saliency.SALIENCY)
def test_no_rollouts_and_no_reasoning_are_salient_nowhere(model, tokenizer, rollouts, kind):
    measure = saliency.SALIENCY[kind]
    assert measure(model, tokenizer, []) == []
    assert [len(values) for values in measure(model, tokenizer, rollouts[2:])] == [0]


def test_a_window_hides_what_is_behind_it(tokenizer):
    """Layers that see the last 4 tokens only: what is left of the reasoning in the box's sight is
    salient, nothing before it, as in whole sequences."""
    model = tiny_qwen3(
        vocab_size=len(tokenizer), sliding_window=4, use_sliding_window=True, max_window_layers=0
    ).double()
    one = correct_rollout(tokenizer, TEXTS[0])
    answers = saliency.Answers(model, tokenizer, [one])
    scores = torch.zeros(answers.is_reasoning.shape, dtype=torch.double, requires_grad=True)
    loss = answers.loss(scores)
    ids = torch.tensor([one.prompt + one.token_ids])
    box = len(one.prompt) + saliency.box_of(tokenizer, one)
    whole = model(input_ids=ids).logits[0].log_softmax(-1)
    expected = -sum(whole[t - 1, ids[0, t]] for t in range(box + 1, ids.shape[1]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (slopes,) = torch.autograd.grad(loss, scores)
    assert slopes[0].nonzero().flatten().tolist() == [box - k for k in (3, 2, 1)]


def test_rows_do_not_change_each_other_where_rope_looks_at_the_largest_position(
    tokenizer, rollouts
):
    model = tiny_qwen3(
        vocab_size=len(tokenizer),
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )
    together = saliency.by_mask(model, tokenizer, rollouts)
    for one, values in zip(rollouts, together, strict=True):
        (alone,) = saliency.by_mask(model, tokenizer, [one])
        torch.testing.assert_close(values, alone, rtol=0, atol=2e-3)


@pytest.mark.parametrize("mark", ["\U0001f600", "é", "x"])
def test_characters_in_several_tokens_do_not_hide_the_box(mark):
    """An unfinished character is one replacement character for each byte, so the text gets shorter
    when it is whole."""
    whole = f"xxxx{mark}\\boxed{{2}}"
    units = [*whole[:4].encode(), *whole[4:5].encode(), *whole[5:].encode()]

    def decode(ids):
        text = bytes(ids).decode("utf-8", errors="ignore")
        return text + "\ufffd" * (len(ids) - len(text.encode()))

    one = Rollout(units, [], True, Problem("", "", "2", 1), []).grade(whole)
    box = saliency.box_of(SimpleNamespace(decode=decode), one)
    assert decode(units[box:]) == "\\boxed{2}"


def test_states_carry_what_a_mask_cannot_hide(tokenizer):
    model = tiny_hybrid()
    with pytest.raises(InputError, match="--saliency mask: layers of this model carry"):
        saliency.by_mask(model, tokenizer, [])


@pytest.mark.parametrize("kind", saliency.SALIENCY)
def test_correct_rollouts_earn_half_their_mean_saliency(tmp_path, kind):
    """One step of the toy, whose student is still the base model."""
    out = tmp_path / "run"
    family_here(
        *["--method", "atmanrl", "--saliency", kind, "--preset", "toy", "--steps", "1"],
        *["--prompts-per-step", "1", "--rollouts-per-prompt", "4", "--eval-data", ""],
        *["--seed", "6", "--out", out],
    )
    model, tokenizer = load_model(str(toy.model_directory()), torch.float32, torch.device("cpu"))
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    correct = []
    for row in rows:
        problem = Problem(row["problem"], "", row["gold"], row["line"])
        prompt = teacher.encode(tokenizer, teacher.student_messages(row["problem"]))
        ids = [*tokenizer.encode(row["completion"]), tokenizer.eos_token_id]
        one = Rollout(ids, [], True, problem, prompt).grade(row["completion"])
        if one.correct:
            correct.append((row, one))
        else:
            assert row["reward"] == 0
    assert 0 < len(correct) < 4
    found = saliency.SALIENCY[kind](model, tokenizer, [one for _, one in correct])
    for (row, _), values in zip(correct, found, strict=True):
        assert row["reward"] == pytest.approx(1 + values.mean().item() / 2, abs=2e-3)


@pytest.mark.parametrize("kind", saliency.SALIENCY)
def test_a_signal_ends_the_work_at_once(tmp_path, monkeypatch, kind):
    """Not after the step, which may take minutes; the run is resumed from the step before."""
    out = tmp_path / "run"
    calls = []

    def interrupt(stop):
        calls.append(stop)
        if len(calls) == 3:
            stop.note(signal.SIGTERM, None)
        if stop.number:
            raise run.Interrupted

    def noting(*arguments, f=saliency.SALIENCY[kind]):
        monkeypatch.setattr(run.StopRequest, "interrupt", interrupt)
        return f(*arguments[:3], arguments[3].__self__.interrupt)

    monkeypatch.setitem(saliency.SALIENCY, kind, noting)
    with pytest.raises(SystemExit):
        family_here(
            *["--method", "atmanrl", "--saliency", kind, "--preset", "toy", "--steps", "2"],
            *["--prompts-per-step", "2", "--rollouts-per-prompt", "8", "--eval-data", ""],
            *["--out", out],
        )
    assert len(calls) == 3 and not (out / "model").exists()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000000"]
