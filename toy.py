r"""The embedded default: a tiny Qwen3 checkpoint and arithmetic problems, in the ordinary formats.

    python toy.py                  # says where they are, and how good the model is
    python toy.py --build          # makes the model again, in about two minutes

With it `python train.py` needs no download. The problems are such as "What is 7+5+9+4?"; they come
from a seed, and are written at every start. The tokenizer is byte-level, with a chat template. The
model has 0.3 million parameters; its weights lie in support/toy/. It was warmed up by supervised
learning on solutions with mistakes, fewer of them after the teacher's prompt:

    student prompt (problem)              of the steps 25 % are wrong, 30 % repeated, 60 % follow a musing
    teacher prompt (problem + solution)   1 %, 10 % and 30 %

So the same weights do much better when they are shown the reference solution: what
self-distillation needs. A musing is eight random words: five forks, and three pivots, since
certainty is near. So are beginnings of steps; digits are locks.

To train.py and eval.py `toy` is short for the paths of model and problems. The weights know the
prompts of teacher.py word for word: if these change, a sentence says so, and a model is warmed up
on the new ones.
"""

import hashlib
import json
import shutil
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
import tokenizers
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import reward
import rollout
import teacher
from support.checkpoint import atomic_directory
from support.data import load_model
from support.distributed import choose_threads
from support.flags import Parser
from support.run import one_line_errors, say

SHIPPED = Path(__file__).parent / "support" / "toy"  # the model as it comes with these files
PROBLEMS = Path("runs/toy-problems")  # in the working directory
UPDATES, LEARNING_RATE = 400, 5e-3
# With the teacher's prompt?, traces per update, probabilities per step of a wrong result, of a
# repetition, of a musing
KINDS = (
    (False, 16, {"wrong": 0.25, "repeat": 0.3, "muse": 0.6}),
    (True, 20, {"wrong": 0.01, "repeat": 0.1, "muse": 0.3}),
)
# each is one token
MUSINGS = (
    "hmm ",
    "perhaps ",
    "maybe ",
    "actually ",
    "alternatively ",
    "seems ",
    "might ",
    "likely ",
)
DIGITS = "zero one two three four five six seven eight nine".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content "
    "}}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if "
    "enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% "
    "endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def resolve(name: str, part: str) -> str:
    """`name` itself, or, if it is "toy", the path of one of its parts: "model", "train.jsonl" or
    "test.jsonl"."""
    if name != "toy":
        return name
    return str(model_directory() if part == "model" else problem_file(part))


def problem_file(part: str, root: Path = PROBLEMS, seed: int = 0) -> Path:
    """train.jsonl or test.jsonl in `root`, written anew from the seed."""
    problems = draw_problems(np.random.default_rng(seed))[part == "test.jsonl"]
    root.mkdir(parents=True, exist_ok=True)
    own = root / f"{part}.{uuid.uuid4().hex}"  # other processes may write and read it now, too
    own.write_text("".join(json.dumps(make_row(terms)) + "\n" for terms in problems))
    return own.replace(root / part)


def draw_problems(rng: np.random.Generator) -> tuple[list[list[int]], list[list[int]]]:
    """(training problems, held-out problems), none of which are in both."""
    test = {tuple(make_problem(rng)) for _ in range(512)}
    train = [
        terms for terms in (make_problem(rng) for _ in range(4096)) if tuple(terms) not in test
    ]
    return train, [list(terms) for terms in sorted(test)]


def model_directory(root: Path = Path("runs")) -> Path:
    """The shipped model, or, if its prompts are not those of teacher.py, one in `root` that was
    warmed up on these."""
    if fits(SHIPPED):
        return SHIPPED
    prompts = json.dumps(known_prompts(make_tokenizer()))
    path = root / f"toy-{hashlib.sha256(prompts.encode()).hexdigest()[:12]}"
    if not path.exists():
        print(
            f"toy: the weights in {SHIPPED} do not know the prompts of teacher.py, or the "
            "tokenizer, as they are now. A model is warmed up on these, about two minutes, and "
            f"kept in {path}.",
            file=sys.stderr,
        )
        root.mkdir(parents=True, exist_ok=True)
        own = root / f"{path.name}.{uuid.uuid4().hex}"
        build(own)
        try:
            own.rename(path)
        except OSError:  # another process was faster
            shutil.rmtree(own)
    return path


def fits(path: Path) -> bool:
    """Whether the model in `path` was warmed up on the prompts of today."""
    with suppress(OSError, ValueError):  # of files that are missing or damaged
        known = known_prompts(PreTrainedTokenizerFast.from_pretrained(path))
        return (path / "model.safetensors").exists() and json.loads(
            (path / "prompts.json").read_text()
        ) == known
    return False


def known_prompts(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token ids of what the model learns to read: both prompts of a problem, with its solution,
    thinking or not."""
    row = make_row([2, 3, 4])
    return [
        teacher.encode(tokenizer, _messages(row, privileged), thinking)
        for privileged in (False, True)
        for thinking in (False, True)
    ]


def make_problem(rng: np.random.Generator) -> list[int]:
    """The summands of one problem: 4 or 5 different numbers from 2 to 9."""
    return rng.permutation(np.arange(2, 10))[: rng.integers(4, 6)].tolist()


def make_trace(terms: list[int], rng: np.random.Generator, wrong=0.0, repeat=0.0, muse=0.0) -> str:
    """A worked solution with mistakes of these probabilities per step; without them the reference
    solution.

    >>> make_trace([7, 5, 9], np.random.default_rng(0))
    '7+5=12. 12+9=21. \\\\boxed{21}'
    """
    total, steps = terms[0], []
    for term in terms[1:]:
        before, total = total, total + term
        if rng.random() < wrong:
            total += int(rng.choice([-2, -1, 1, 2]))
        step = f"{before}+{term}={total}."
        steps.append("".join(rng.choice(MUSINGS, 8)) + step if rng.random() < muse else step)
        while rng.random() < repeat:
            steps.append(f"wait, {step}")
    return " ".join([*steps, f"\\boxed{{{total}}}"])


def make_row(terms: list[int]) -> dict:
    """One line of a data file."""
    solution = make_trace(terms, np.random.default_rng(0))
    return {
        "problem": f"What is {'+'.join(map(str, terms))}?",
        "solution": solution,
        "answer": str(sum(terms)),
        "restated": (
            "What is "
            f"{' plus '.join(' '.join(DIGITS[int(d)] for d in str(term)) for term in terms)}?"
        ),
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, which encodes any text. Every digit is a token, and so is each fixed sentence
    of the prompts."""
    pieces = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pieces.Sequence(
        [
            pieces.Digits(individual_digits=True),
            pieces.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    messages = _messages(make_row([2, 3]), False) + _messages(make_row([2, 3]), True)
    corpus = [message["content"] for message in messages] + [
        "user\nassistant\n\n\nwait, 2+3=5. 5+2=7. \\boxed{7}"
    ]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pieces.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens(list(MUSINGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A random Qwen3 of 3 layers and width 96; large initial weights and a small rope_theta suit a
    model this small."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            max_position_embeddings=4096,
            initializer_range=0.08,
            rope_parameters={"rope_type": "default", "rope_theta": 200.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build(path: Path, seed: int = 0) -> None:
    """Warm a model up, and write it with its tokenizer into the directory `path`, in float16: 0.7
    MB."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    choose_threads(sum(parameter.numel() for parameter in model.parameters()))
    problems, _ = draw_problems(rng)
    _warm_up(model, tokenizer, problems, rng)
    with atomic_directory(path) as work:
        model.half().save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "prompts.json").write_text(json.dumps(known_prompts(tokenizer)) + "\n")


def _warm_up(model, tokenizer, problems: list[list[int]], rng: np.random.Generator) -> None:
    """Supervised learning on both kinds of solutions, with and without a thinking block."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=UPDATES, pct_start=0.1
    )
    for _ in tqdm(range(UPDATES), desc="toy: supervised warm-up", mininterval=1):
        for privileged, count, mistakes in KINDS:
            batch = [problems[i] for i in rng.integers(len(problems), size=count)]
            if not privileged:  # short problems, of 2 to 5 summands, help the student to learn
                batch = [terms[: rng.integers(2, 6)] for terms in batch]
            prompts = [
                teacher.encode(
                    tokenizer,
                    _messages(make_row(terms), privileged),
                    thinking=bool(rng.integers(2)),
                )
                for terms in batch
            ]
            traces = [
                tokenizer.encode(make_trace(terms, rng, **mistakes) + tokenizer.eos_token)
                for terms in batch
            ]
            reading = teacher.read(model, prompts, traces)
            (-reading.logp.sum() / reading.mask.sum() / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def accuracy(model, tokenizer, data: Path, privileged: bool) -> float:
    """Share of the file's problems that one sample at temperature 1 solves, with the student's or
    teacher's prompt."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    prompts = [teacher.encode(tokenizer, _messages(row, privileged)) for row in rows]
    completions = rollout.sample(
        model,
        prompts,
        max_new_tokens=160,
        stop_ids=rollout.stop_ids(model, tokenizer),
        slots=128,
        generator=torch.Generator().manual_seed(0),
    )
    return float(
        np.mean(
            [
                reward.grade(
                    tokenizer.decode(completion.token_ids, skip_special_tokens=True), row["answer"]
                )
                for completion, row in zip(completions, rows, strict=True)
            ]
        )
    )


def _messages(row: dict, privileged: bool) -> list[dict]:
    problem, solution = row["problem"], row["solution"]
    return (
        teacher.teacher_messages(problem, solution)
        if privileged
        else teacher.student_messages(problem)
    )


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument(
        "--build",
        action="store_true",
        help="warm the model up again, and put it in the place of "
        "the one that came with these files",
    )
    with one_line_errors("toy.py", "stopped, nothing was written"):
        if vars(parser.parse_args()):
            build(SHIPPED)
        folder, test = model_directory(), problem_file("test.jsonl")
        say(f"toy: {folder}, {problem_file('train.jsonl')}, {test}")
        model, tokenizer = load_model(str(folder), torch.float32, torch.device("cpu"))
        plain, shown = (
            accuracy(model, tokenizer, test, privileged) for privileged in (False, True)
        )
        say(
            f"accuracy on held-out problems: {plain:.3f} with the student prompt, "
            f"{shown:.3f} with the teacher prompt"
        )
