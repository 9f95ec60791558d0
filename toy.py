r"""The embedded default: a tiny Qwen3 checkpoint and arithmetic problems, in the ordinary formats.

    python toy.py                  # says where they are, and how good the model is
    python toy.py --build          # makes the model again, in about two minutes

With it `python train.py` needs no download. A problem is "What is 7+5+9+4?". All problems come from
a seed, and are written at every start. The tokenizer is byte-level, with a chat template. The model
has 0.3 million parameters. Its weights are in support/toy/. It was warmed up by supervised learning
on solutions with mistakes. After the teacher's prompt there are fewer of them:

    student prompt (problem)              25 % of the steps are wrong, 30 % are repeated, 60 % follow a musing
    teacher prompt (problem + solution)   1 %, 10 % and 30 %

So the same weights do much better when they see the reference solution. Self-distillation needs
that. A musing is eight random words. The first five are forks. The last three are pivots, since the
next step is near. The beginning of a step is a pivot, too. Digits are locks.

For train.py and eval.py, `toy` stands for the paths of model and problems. The weights know the
prompts of teacher.py word for word. If the prompts change, a message says so, and a model is warmed
up on the new ones.
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
from support.run import one_line_errors

SHIPPED = Path(__file__).parent / "support" / "toy"  # the model as it comes with these files
PROBLEMS = Path("runs/toy-problems")  # in the working directory
UPDATES = 400
LEARNING_RATE = 5e-3
# Kinds of solutions: with the teacher's prompt or not; how many per update; the probabilities that
# a step is wrong, is repeated, follows a musing
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
WORDS = "zero one two three four five six seven eight nine plus".split()
SPOKEN = dict(zip("0123456789+", WORDS, strict=True))
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
    problems = draw_problems(np.random.default_rng(seed))[part]
    root.mkdir(parents=True, exist_ok=True)
    own = root / f"{part}.{uuid.uuid4().hex}"  # another process may write or read the file now
    own.write_text("".join(json.dumps(make_record(terms)) + "\n" for terms in problems))
    return own.replace(root / part)


def draw_problems(rng):
    """The problems of both files, as tuples of summands. No problem is in both."""
    test = {tuple(make_problem(rng)) for _ in range(512)}
    drawn = [tuple(make_problem(rng)) for _ in range(4096)]
    train = [terms for terms in drawn if terms not in test]
    return {"train.jsonl": train, "test.jsonl": sorted(test)}


def model_directory(root: Path = Path("runs")) -> Path:
    """The shipped model. If it does not know the prompts of teacher.py, a model in `root` that was
    warmed up on them."""
    if fits(SHIPPED):
        return SHIPPED
    prompts = json.dumps(known_prompts(make_tokenizer())).encode()
    path = root / f"toy-{hashlib.sha256(prompts).hexdigest()[:12]}"
    if not path.exists():
        print(
            f"toy: the weights in {SHIPPED} do not know the prompts of teacher.py, or the "
            "tokenizer, as they are now. A model is warmed up on them, in about two minutes, and "
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
    """Whether the model in `path` was warmed up on the prompts as they are now."""
    with suppress(OSError, ValueError):  # files are missing or damaged
        learned = json.loads((path / "prompts.json").read_text())
        return learned == known_prompts(PreTrainedTokenizerFast.from_pretrained(path))
    return False


def known_prompts(tokenizer):
    """Token ids of what the model learns to read: both prompts of a problem, thinking or not."""
    record = make_record((2, 3, 4))
    return [
        _prompt(tokenizer, record, privileged, thinking)
        for privileged in (False, True)
        for thinking in (False, True)
    ]


def make_problem(rng):
    """The summands of one problem: 4 or 5 different numbers from 2 to 9."""
    return rng.permutation(np.arange(2, 10))[: rng.integers(4, 6)].tolist()


def make_trace(terms, rng, wrong=0.0, repeat=0.0, muse=0.0):
    """A worked solution, given the summands. The probabilities of mistakes are per step; without
    mistakes it is the reference solution.

    >>> make_trace([7, 5, 9], np.random.default_rng(0))
    '7+5=12. 12+9=21. \\\\boxed{21}'
    """
    total = terms[0]
    steps = []
    for term in terms[1:]:
        before = total
        total += term
        if rng.random() < wrong:
            total += int(rng.choice([-2, -1, 1, 2]))
        step = f"{before}+{term}={total}."
        musing = "".join(rng.choice(MUSINGS, 8)) if rng.random() < muse else ""
        steps.append(musing + step)
        while rng.random() < repeat:
            steps.append(f"wait, {step}")
    return " ".join([*steps, f"\\boxed{{{total}}}"])


def make_record(terms):
    """The fields of one line of a data file, given the summands."""
    asked = "+".join(map(str, terms))
    return {
        "problem": f"What is {asked}?",
        "solution": make_trace(terms, np.random.default_rng(0)),
        "answer": str(sum(terms)),
        "restated": f"What is {' '.join(SPOKEN[character] for character in asked)}?",
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, which encodes any text. Every digit is a token, and so is each fixed sentence
    of the prompts."""
    pieces = tokenizers.pre_tokenizers
    bytewise = pieces.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pieces.Sequence([pieces.Digits(individual_digits=True), bytewise])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    corpus = ["user\nassistant\n\n\nwait, 2+3=5. 5+2=7. \\boxed{7}"]
    for privileged in (False, True):
        corpus.append(_messages(make_record((2, 3)), privileged)[0]["content"])
    tokenizer.train_from_iterator(
        corpus,
        tokenizers.trainers.BpeTrainer(
            vocab_size=2000,
            min_frequency=1,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pieces.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens(list(MUSINGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A random Qwen3 of 3 layers and width 96. Large initial weights and a small rope_theta suit so
    small a model."""
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
    """Warm a model up. Write it, in float16 (0.7 MB), and its tokenizer into the directory `path`."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    choose_threads(model.num_parameters())
    _warm_up(model, tokenizer, draw_problems(rng)["train.jsonl"], rng)
    with atomic_directory(path) as work:
        model.half().save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "prompts.json").write_text(json.dumps(known_prompts(tokenizer)) + "\n")


def _warm_up(model, tokenizer, problems, rng):
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
                _prompt(tokenizer, make_record(terms), privileged, bool(rng.integers(2)))
                for terms in batch
            ]
            traces = [make_trace(terms, rng, **mistakes) + tokenizer.eos_token for terms in batch]
            reading = teacher.read(model, prompts, tokenizer(traces).input_ids)
            (-reading.logp.sum() / reading.mask.sum() / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def accuracy(model, tokenizer, data: Path, privileged: bool) -> float:
    """Share of the file's problems that one sample at temperature 1 solves, with the student's or
    teacher's prompt."""
    records = [json.loads(line) for line in data.read_text().splitlines()]
    prompts = [_prompt(tokenizer, record, privileged) for record in records]
    completions = rollout.sample(
        model,
        prompts,
        max_new_tokens=160,
        stop_ids=rollout.stop_ids(model, tokenizer),
        unused=rollout.unused_ids(model, tokenizer),
        slots=128,
        generator=torch.Generator().manual_seed(0),
    )
    solved = 0
    for completion, record in zip(completions, records, strict=True):
        text = tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        solved += reward.grade(text, record["answer"])
    return solved / len(records)


def _prompt(tokenizer, record, privileged, thinking=False):
    return teacher.encode(tokenizer, _messages(record, privileged), thinking)


def _messages(record, privileged):
    if privileged:
        return teacher.teacher_messages(record["problem"], record["solution"])
    return teacher.student_messages(record["problem"])


def main() -> None:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--build",
        action="store_true",
        help="warm the model up again, and replace the one that came with these files",
    )
    with one_line_errors("toy.py", "stopped, nothing was written"):
        if "build" in parser.parse_args():
            build(SHIPPED)
        folder = model_directory()
        test = problem_file("test.jsonl")
        print(f"toy: {folder}, {problem_file('train.jsonl')}, {test}", flush=True)
        model, tokenizer = load_model(str(folder), torch.float32, torch.device("cpu"))
        plain = accuracy(model, tokenizer, test, privileged=False)
        shown = accuracy(model, tokenizer, test, privileged=True)
        print(
            f"accuracy on held-out problems: {plain:.3f} with the student prompt, "
            f"{shown:.3f} with the teacher prompt"
        )


if __name__ == "__main__":
    main()
