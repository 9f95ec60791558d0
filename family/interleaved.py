"""Solutions that student and teacher write in turns: TESSY, arXiv 2604.14164.

The teacher, who sees the solution, writes what takes ability. The student writes what is style, so
that the text stays near its own. The student begins. Whoever writes is asked for a few tokens, a
piece. The teacher's piece is cut before the first word of style, the student's before the first other
word. After a cut the other goes on, without one the same writer. A word that the limit breaks off is
left to the next piece. What follows a thought is the student's alone.

    student asked for 5 tokens     "hmm perhaps 7+5"         kept: "hmm perhaps "      7+5 may go on: student again
    student                        "7+5=12"                  kept: nothing             7+5=12 is no style: teacher
    teacher asked for 10 tokens    "7+5=12. wait, 12"        kept: "7+5=12. "          wait is style: student

In the source a classifier for each writer, trained on annotated text, says where style begins or ends.
Ours is a list of words. Also ours: the teacher is the same model, shown the solution; if a cut leaves
nothing of a piece, the first word of the next is kept, whatever it is; there is no check for
repetition; where no thought is opened, the whole text is written in turns.
"""

from dataclasses import dataclass

import reward
import rollout
import teacher
from family import asking
from family.contexts import Example, token_texts

PIECES = {"student": 5, "teacher": 10}  # tokens asked for at a time, by writer
STYLE = set(
    """wait hmm perhaps maybe actually alternatively seems might likely check
    well okay ok alright right oh ah so then now let let's me us see think i i'll we'll just really
    basically simply again but if however first next finally""".split()
)


@dataclass
class Draft(Example):
    """A solution in the making. asked["turns"] gets (writer, text) of every piece of
    which something was kept."""

    writer: str = "student"  # whose turn it is
    is_thought: bool = False  # what was said so far is a thought that has no end
    is_answer: bool = False  # the thought has ended
    moved: bool = True  # the last piece left something
    by_teacher: int = 0  # tokens

    def is_open(self, most: int) -> bool:
        return not self.finished and len(self.token_ids) < most

    def add(self, piece: rollout.Completion, tokenizer) -> None:
        """Take what the writer may keep of a piece, and say who goes on."""
        writer = self.writer
        found = [] if self.is_answer else words(tokenizer, piece)
        kept = len(piece.token_ids)
        if found and not piece.finished:  # without a word that may go on
            kept = found[-1][1]
        for start, end, word in found:
            said = tokenizer.decode(self.token_ids + piece.token_ids[:end])
            is_thought = reward.after_thought(said, self.prompt_end) is None
            if self.is_thought and not is_thought:  # whoever ends it
                kept = end
                self.is_answer = True
                self.writer = "student"
                break
            is_own = not word or (word in STYLE) == (writer == "student")
            if not is_own and (start or self.moved):
                kept = start
                self.writer = "teacher" if writer == "student" else "student"
                break
            self.is_thought = is_thought
        ids = piece.token_ids[:kept]
        self.token_ids += ids
        self.logprobs += piece.logprobs[:kept]
        self.finished = piece.finished and kept == len(piece.token_ids)
        self.moved = kept > 0
        self.by_teacher += kept * (writer == "teacher")
        if ids:
            self.asked["turns"].append((writer, tokenizer.decode(ids)))


def words(tokenizer, piece):
    """(first token, end, word in small letters) of every word of a piece, without a stop token, and
    without a last word that may go on, unless it is the only one. The word is "" where there is
    nothing but space and punctuation."""
    texts = token_texts(tokenizer, piece.token_ids[: len(piece.token_ids) - piece.finished])
    found = []
    start = 0
    for end, text in enumerate(texts, 1):
        if text[-1:].isspace() or end == len(texts) or texts[end][:1].isspace():
            word = "".join(texts[start:end]).strip(" \n\t.,;:!?-").lower()
            found.append((start, end, word))
            start = end
    goes_on = not piece.finished and not texts[-1][-1:].isspace()
    return found[:-1] if goes_on and len(found) > 1 else found


def solutions(t, problems):
    """One solution of each problem, right or wrong."""
    most = t.s.max_new_tokens
    end = teacher.prompt_end(t.tokenizer, t.s.thinking, t.s.date)
    drafts = [Draft([], [], False, problem, t.student_prompt(problem)) for problem in problems]
    for draft in drafts:
        draft.prompt_end = end
        draft.is_thought = reward.after_thought("", end) is None
        draft.asked["turns"] = []
    shown = t.objective.teacher_prompts(t, drafts)
    prompts = {"student": [draft.prompt for draft in drafts], "teacher": shown}
    turn = 0
    while t.ranks.max(sum(draft.is_open(most) for draft in drafts)):
        for writer in PIECES:
            write(t, drafts, writer, prompts[writer], turn)
        turn += 1
    written = []
    for draft in drafts:
        finished = draft.finished and len(draft.token_ids) <= most
        whole = rollout.Completion(draft.token_ids[:most], draft.logprobs[:most], finished)
        example = asking.graded(t, draft, whole, t.s.thinking)
        example.asked = draft.asked
        written.append(example)
    shares = [draft.by_teacher / len(draft.token_ids) for draft in drafts]
    t.objective.note(t, "teacher_share", shares)
    return written


def write(t, drafts, writer, prompts, turn):
    """A piece of every draft whose turn is that of `writer`."""
    most = t.s.max_new_tokens
    asked = []
    for draft, prompt in zip(drafts, prompts, strict=True):
        is_asked = draft.writer == writer and draft.is_open(most)
        asked.append(prompt + draft.token_ids if is_asked else None)
    model_as = t.objective.as_teacher(t) if writer == "teacher" else None
    tokens = min(PIECES[writer], most)
    found = asking.ask(t, asked, f"{writer}'s pieces", model_as, tokens, turn)
    for draft, piece in zip(drafts, found, strict=True):
        if piece:
            draft.add(piece, t.tokenizer)
