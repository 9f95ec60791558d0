r"""The embedded default: a tiny Qwen3 checkpoint and arithmetic problems, written to disk in the ordinary formats.

    python toy.py                  # makes them, prints where they are and how good the model is

Nothing can be downloaded for `python train.py` to have something to train, so this file makes it: problems such as
"What is 7+5+9+4?", a byte-level tokenizer with a chat template, and a model of 0.3 million parameters, warmed up
by supervised learning on two kinds of solutions:

    student prompt (problem)              wrong steps now and then, and far too many steps said twice
    teacher prompt (problem + solution)   hardly any of either

So the base model reasons step by step, errs, and re-checks itself to no avail, and the same weights shown the reference
solution do much better: the situation that self-distillation is for. What comes out is a checkpoint directory and JSONL
files like any other; train.py and eval.py know the name `toy` only as a short form of these paths.

Files go to runs/toy-<hash>/, the hash being that of everything they depend on, and are made once.
"""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import reward
import rollout
import teacher

ROOT = Path("runs")
UPDATES, LEARNING_RATE = 360, 5e-3
STUDENT_TRACES, TEACHER_TRACES = 20, 16  # per update
STUDENT_HABITS = {"wrong": 0.2, "again": 0.35}  # per step: probability of a wrong result, of saying it once more
TEACHER_HABITS = {"wrong": 0.01, "again": 0.1}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def resolve(name: str, part: str) -> str:
    """`name` itself, or, if it is "toy", the path of that part of the toy: "model", "train.jsonl" or "test.jsonl"."""
    return name if name != "toy" else str(build() / part)


def build(seed: int = 0, root: Path = ROOT) -> Path:
    """The directory that holds model/, train.jsonl and test.jsonl; made on first use, in about a minute on two cores."""
    sources = b"".join(Path(module.__file__).read_bytes() for module in (teacher, rollout))
    versions = f"{torch.__version__} {transformers.__version__} {tokenizers.__version__} {seed}"
    digest = hashlib.sha256(Path(__file__).read_bytes() + sources + versions.encode()).hexdigest()[:12]
    path = root / f"toy-{digest}"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=root))
        try:
            _make(work, seed)
            if not path.exists():  # or another process was faster; what it made is identical
                os.rename(work, path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path


def make_problem(rng: np.random.Generator) -> list[int]:
    """The summands of one problem: 4 or 5 different numbers from 2 to 9."""
    return rng.permutation(np.arange(2, 10))[:rng.integers(4, 6)].tolist()


def make_trace(terms: list[int], rng: np.random.Generator, wrong: float = 0.0, again: float = 0.0) -> str:
    """A worked solution; with `wrong` and `again` both 0 the reference solution.

    >>> make_trace([7, 5, 9], np.random.default_rng(0))
    '7+5=12. 12+9=21. \\\\boxed{21}'
    """
    total, steps = terms[0], []
    for term in terms[1:]:
        result = total + term
        if rng.random() < wrong:
            result += int(rng.choice([-2, -1, 1, 2]))
        step = f"{total}+{term}={result}."
        steps.append(step)
        while rng.random() < again:
            steps.append(f"wait, {step}")
        total = result
    return " ".join([*steps, f"\\boxed{{{total}}}"])


def make_row(terms: list[int]) -> dict:
    """One line of a data file."""
    solution = make_trace(terms, np.random.default_rng(0))
    return {"problem": f"What is {'+'.join(map(str, terms))}?", "solution": solution, "answer": str(sum(terms))}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be encoded; digits stay single, the prompts' fixed sentences are one token."""
    pieces = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pieces.Sequence([pieces.Digits(individual_digits=True),
                                               pieces.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    row = make_row([2, 3])
    corpus = [message["content"] for prompt in (teacher.student_messages(row["problem"]),
                                                teacher.teacher_messages(row["problem"], row["solution"]))
              for message in prompt] + ["user\nassistant\n\n\nwait, 2+3=5. 5+2=7. \\boxed{7}"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2000, min_frequency=1, special_tokens=SPECIAL_TOKENS,
                                             initial_alphabet=pieces.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT_TEMPLATE)


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A random Qwen3 of 3 layers and width 96; wide initial weights and fast rotary angles suit a model this small."""
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=24, max_position_embeddings=4096,
                         initializer_range=0.08, rope_parameters={"rope_type": "default", "rope_theta": 200.0},
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    return Qwen3ForCausalLM(config)


def _make(path: Path, seed: int) -> None:
    """Everything that `build` promises, into an existing directory."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    test = {tuple(make_problem(rng)) for _ in range(512)}
    train = [terms for terms in (make_problem(rng) for _ in range(4096)) if tuple(terms) not in test]
    for name, problems in (("train", train), ("test", sorted(test))):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(make_row(list(terms))) + "\n" for terms in problems))
    _warm_up(model, tokenizer, train, rng)
    print(f"toy: accuracy of the base model on {len(test)} held-out problems:", *(
        f"{accuracy(model, tokenizer, path / 'test.jsonl', privileged):.2f} with the {name} prompt{end}"
        for privileged, name, end in ((False, "student", ","), (True, "teacher", ""))), flush=True)
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")


def _warm_up(model, tokenizer, problems: list[list[int]], rng: np.random.Generator) -> None:
    """Supervised learning on both kinds of traces, with and without a thinking block; short problems help the student."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=UPDATES, pct_start=0.1)
    for _ in tqdm(range(UPDATES), desc="toy: supervised warm-up", mininterval=1):
        for privileged, habits, count in ((False, STUDENT_HABITS, STUDENT_TRACES), (True, TEACHER_HABITS, TEACHER_TRACES)):
            batch = [problems[i] for i in rng.integers(len(problems), size=count)]
            if not privileged:
                batch = [terms[:rng.integers(2, 6)] for terms in batch]
            prompts = [_prompt(tokenizer, make_row(terms), privileged, bool(rng.integers(2))) for terms in batch]
            traces = [tokenizer.encode(make_trace(terms, rng, **habits)) + [tokenizer.eos_token_id] for terms in batch]
            reading = teacher.read(model, prompts, traces)
            (-reading.logp.sum() / reading.mask.sum() / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def accuracy(model, tokenizer, data: Path, privileged: bool) -> float:
    """Share of the file's problems solved by one sample each at temperature 1, with the student's or teacher's prompt."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    completions = rollout.sample(model, [_prompt(tokenizer, row, privileged) for row in rows], max_new_tokens=160,
                                 stop_ids=rollout.stop_ids(model, tokenizer), slots=128,
                                 generator=torch.Generator().manual_seed(0))
    return float(np.mean([reward.grade(tokenizer.decode(completion.token_ids, skip_special_tokens=True), row["answer"])
                          for completion, row in zip(completions, rows)]))


def _prompt(tokenizer, row: dict, privileged: bool, thinking: bool = False) -> list[int]:
    messages = teacher.teacher_messages(row["problem"], row["solution"]) if privileged else \
        teacher.student_messages(row["problem"])
    return teacher.encode(tokenizer, messages, thinking)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the toy checkpoint and its problems.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of problems, initial weights and warm-up")
    path = build(parser.parse_args().seed)
    print(f"toy: {path / 'model'}, {path / 'train.jsonl'}, {path / 'test.jsonl'}")
