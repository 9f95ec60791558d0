"""family/interleaved.py: who keeps what of a piece, and whole texts against a slow loop."""

from contextlib import nullcontext

import pytest
import torch
from test_asking import samples, trainer
from test_family import every_other_one_is_correct, whole_logits
from tqdm import tqdm

import lora
import rollout
import toy
from family import asking, interleaved
from family.interleaved import PIECES, Draft


@pytest.fixture(scope="module")
def tokenizer():
    return toy.make_tokenizer()


def draft_after(tokenizer, writer, text, finished=False, is_thought=False, moved=True):
    """A draft whose text was empty, after a piece."""
    draft = Draft([], [], False, None, [], writer=writer, is_thought=is_thought)
    draft.moved = moved
    draft.prompt_end = "<think>\n" if is_thought else ""
    draft.asked["turns"] = []
    ids = tokenizer.encode(text) + [tokenizer.eos_token_id] * finished
    logprobs = [-float(i) for i in range(len(ids))]
    draft.add(rollout.Completion(ids, logprobs, finished), tokenizer)
    assert draft.token_ids == ids[: len(draft.token_ids)]
    assert draft.logprobs == logprobs[: len(draft.token_ids)]
    assert draft.by_teacher == (len(ids) and len(draft.token_ids) * (writer == "teacher"))
    text = tokenizer.decode(draft.token_ids)
    assert draft.asked["turns"] == [(writer, text)] * bool(text)
    return draft


@pytest.mark.parametrize(
    "writer, text, kept, goes_on",
    [
        ("student", "hmm perhaps 7+5 ", "hmm perhaps ", "teacher"),
        ("student", "hmm, Maybe\nlikely ", "hmm, Maybe\nlikely ", "student"),
        ("student", "7+5=1", "", "teacher"),
        ("teacher", "7+5=12. 12+5 ", "7+5=12. 12+5 ", "teacher"),
        ("teacher", "7+5=12. Wait, 12", "7+5=12. ", "student"),
        ("teacher", "7+5=12. ... - ! ", "7+5=12. ... - ! ", "teacher"),
        ("teacher", "hmm perhaps 7", "", "student"),
        ("teacher", "=12. hmm ", "=12. ", "student"),
        # the last word may go on
        ("student", "hmm wai", "hmm ", "student"),
        ("student", "hmm 7+5", "hmm ", "student"),
        ("teacher", "7+5=12. wai", "7+5=12. ", "teacher"),
        ("teacher", "7+5=12. 12+", "7+5=12. ", "teacher"),
        ("teacher", "7+5=12", "7+5=12", "teacher"),
    ],
)
def test_a_piece_is_cut_where_the_other_should_write(tokenizer, writer, text, kept, goes_on):
    draft = draft_after(tokenizer, writer, text)
    assert tokenizer.decode(draft.token_ids) == kept
    assert draft.writer == goes_on and not draft.finished and draft.moved == bool(kept)


@pytest.mark.parametrize(
    "writer, text, kept, goes_on",
    [
        ("teacher", "hmm 7+5= ", "hmm 7+5= ", "teacher"),
        ("teacher", "hmm perhaps 7", "hmm ", "student"),
        ("student", "7+5=12. hmm ", "7+5=12. hmm ", "student"),
        ("student", "7+5=12. 12+9= ", "7+5=12. ", "teacher"),
    ],
)
def test_no_two_pieces_in_a_row_leave_nothing(tokenizer, writer, text, kept, goes_on):
    draft = draft_after(tokenizer, writer, text, moved=False)
    assert tokenizer.decode(draft.token_ids) == kept and draft.writer == goes_on and draft.moved


@pytest.mark.parametrize(
    "writer, text, kept, goes_on",
    [
        ("teacher", "\\boxed{7}", "\\boxed{7}<|im_end|>", None),
        ("teacher", "7 \\boxed{7}", "7 \\boxed{7}<|im_end|>", None),
        ("student", "", "<|im_end|>", None),
        ("student", "hmm ", "hmm <|im_end|>", None),
        ("student", "hmm 7", "hmm ", "teacher"),
        ("teacher", "7. hmm ", "7. ", "student"),
    ],
)
def test_a_stop_token_ends_the_text_if_all_before_it_is_kept(
    tokenizer, writer, text, kept, goes_on
):
    draft = draft_after(tokenizer, writer, text, finished=True)
    assert tokenizer.decode(draft.token_ids) == kept
    assert draft.finished == (goes_on is None) != draft.is_open(99)
    assert draft.writer == (goes_on or writer)


@pytest.mark.parametrize("writer, word", [("student", "So"), ("teacher", "5")])
def test_whoever_ends_the_thought_the_student_goes_on(tokenizer, writer, word):
    draft = draft_after(tokenizer, writer, f"{word} </think> so 5 ", is_thought=True)
    assert tokenizer.decode(draft.token_ids) == f"{word} </think>"
    assert draft.writer == "student" and draft.is_answer
    # without an open thought its end means nothing
    assert not draft_after(tokenizer, writer, f"{word} </think> so 5 ").is_answer


class Half:
    """About half of all words."""

    def __contains__(self, word):
        return sum(map(ord, word)) % 2 == 0


def test_texts_equal_those_of_a_slow_loop(tiny_toy, tmp_path, monkeypatch):
    """Likeliest tokens only. The loop runs the whole text for every token."""
    monkeypatch.setattr(interleaved, "STYLE", Half())
    t = trainer(tiny_toy, tmp_path, "sft", rows="interleaved", **{"ask-temperature": 0})
    for parameter in t.parameters:
        torch.nn.init.normal_(parameter, std=0.1)
    t.log.bar = tqdm(disable=True)
    t.objective.figures = {"asked_tokens": 0}
    problems = t.problems[:6]
    found = interleaved.solutions(t, problems)
    for problem, example in zip(problems, found, strict=True):
        draft = by_loop(t, problem)
        assert example.token_ids == draft.token_ids[:12]
        assert example.finished == (draft.finished and len(draft.token_ids) <= 12)
        whole = "".join(text for _, text in example.asked["turns"])
        assert whole == t.tokenizer.decode(draft.token_ids)
    assert {turn[0] for example in found for turn in example.asked["turns"]} == set(PIECES)
    figures = t.objective.figures
    assert 0 < figures["teacher_share"] < 1


@torch.no_grad()
def by_loop(t, problem):
    draft = Draft([], [], False, problem, t.student_prompt(problem), asked={"turns": []})
    prompts = {"student": draft.prompt, "teacher": t.teacher_prompt(problem, problem.solution)}
    stops = set(rollout.stop_ids(t.model, t.tokenizer))
    while draft.is_open(12):
        piece = []
        while len(piece) < PIECES[draft.writer] and not stops & set(piece):
            ids = torch.tensor([prompts[draft.writer] + draft.token_ids + piece])
            with lora.disabled(t.model) if draft.writer == "teacher" else nullcontext():
                piece.append(t.model(ids).logits[0, -1].argmax().item())
        ended = piece[-1] in stops
        draft.add(rollout.Completion(piece, [0.0] * len(piece), ended), t.tokenizer)
    return draft


def test_the_answer_after_a_thought_is_the_student_s(tiny_toy, tmp_path, monkeypatch):
    t = trainer(tiny_toy, tmp_path, "sft", rows="interleaved", **{"max-new-tokens": 40})
    monkeypatch.setattr(interleaved.teacher, "prompt_end", lambda *_: "<think>\n")
    said = iter(["hmm 7 ", "5 </think> 7", "It is ", "\\boxed{5}"])

    def ask(t, prompts, what, *more):
        if prompts == [None]:
            return prompts
        ids = t.tokenizer.encode(next(said))
        ends = "box" in t.tokenizer.decode(ids)
        ids += [t.tokenizer.eos_token_id] * ends
        return [rollout.Completion(ids, [0.0] * len(ids), ends)]

    monkeypatch.setattr(asking, "ask", ask)
    t.objective.figures = {}
    (example,) = interleaved.solutions(t, t.problems[:1])
    assert example.asked["turns"] == [
        ("student", "hmm "),
        ("teacher", "5 </think>"),
        ("student", "It is "),
        ("student", "\\boxed{5}<|im_end|>"),
    ]
    assert example.answer == "5" and example.finished and example.prompt_end == "<think>\n"


def test_a_step_learns_what_was_kept(tiny_toy, tmp_path, monkeypatch):
    """The loss is -log p, mean over the tokens of the solutions that the verifier accepts; without
    any, nothing is learned."""
    t = trainer(tiny_toy, tmp_path, "sft", rows="interleaved", keep="correct", lr=0.0)
    t.log.bar = tqdm(disable=True)
    t.out.mkdir(exist_ok=True)
    written, solve = [], interleaved.solutions
    monkeypatch.setattr(
        interleaved, "solutions", lambda *some: written.extend(solve(*some)) or written
    )
    monkeypatch.setattr(asking, "grade_rollouts", every_other_one_is_correct(asking.grade_rollouts))
    assert t.train_step()["teacher_accuracy"] == 1.0  # each is graded alone
    written.clear()
    for wrong in (range(1, 8, 2), range(8)):

        def graded(*some, wrong=wrong):
            found = solve(*some)
            for i in wrong:
                found[i].correct = False
            written[:] = found
            return found

        monkeypatch.setattr(interleaved, "solutions", graded)
        step = t.train_step()
        logs = []
        for one in written:
            if one.correct:
                logp = whole_logits(t.model, one.prompt, one)
                logs += [row[y].item() for row, y in zip(logp, one.token_ids, strict=True)]
        assert step["loss"] == pytest.approx(-sum(logs) / max(1, len(logs)), rel=1e-5)
        assert (step["grad_norm"] > 0) == bool(logs)
        # the placeholder of a rank on which nothing is right does not change the mean of the others
        assert t.objective.num_reference == len(logs)
        assert len(samples(t.out)) > 0


def test_every_piece_is_drawn_anew_as_the_source_samples(tiny_toy, tmp_path, monkeypatch):
    t = trainer(tiny_toy, tmp_path, "sft", rows="interleaved")
    t.log.bar = tqdm(disable=True)
    t.objective.figures = {"asked_tokens": 0}
    seeds, sample = [], rollout.sample

    def noting(*prompts, **how):
        assert (how["temperature"], how["top_p"], how["top_k"]) == (0.7, 0.8, 20)
        assert how["max_new_tokens"] in PIECES.values()
        seeds.extend(how["seeds"])
        return sample(*prompts, **how)

    monkeypatch.setattr(interleaved, "STYLE", Half())  # so that there are many turns
    monkeypatch.setattr(rollout, "sample", noting)
    found = interleaved.solutions(t, t.problems[:4])
    assert len(seeds) == len(set(seeds)) > len(found)
