"""What comes in from outside: problems from JSONL files, models from disk or from the hub.

A data file has one JSON object per line: {"problem": "2+3?", "solution": "2+3=5. \\boxed{5}", "answer": "5"}.
`question` or `prompt` may stand for `problem`; without an `answer` the last box of the solution is taken; evaluation
does not need a solution. A user's mistake raises InputError, whose text is one line: file, line, field, and what to do.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora
import reward
import rollout
import teacher
from support.distributed import choose_threads


class InputError(Exception):
    """Something a user can put right; the message is one line that says how."""


@dataclass(frozen=True)
class Problem:
    """One line of a data file. solution is "" where the file has none; line counts from 1."""

    problem: str
    solution: str
    answer: str
    line: int


def load_problems(path: str | Path, need_solution: bool = True,
                  skip_ungradable: bool = False) -> tuple[list[Problem], int]:
    """(problems of a JSONL file, number of rows left out); blank lines are passed over.

    A gold answer that does not equal itself under reward.is_equal could never be rewarded. Such rows raise InputError
    with their line numbers, or are left out and counted if `skip_ungradable`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such data file: check the path (--data, --eval-data)")
    problems, ungradable = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        problem = _parse(path, number, line, need_solution)
        (problems if reward.is_equal(problem.answer, problem.answer) else ungradable).append(problem)
    if ungradable and not skip_ungradable:
        lines = ", ".join(str(problem.line) for problem in ungradable[:20]) + (", ..." if len(ungradable) > 20 else "")
        raise InputError(f"{path}: line {lines}: field 'answer': {len(ungradable)} gold answers that the verifier "
                         "cannot grade: correct them or leave these rows out with --skip-ungradable")
    if not problems:
        raise InputError(f"{path}: no problem in this file: it needs one JSON object per line")
    return problems, len(ungradable)


def _parse(path: Path, number: int, line: bytes, need_solution: bool) -> Problem:
    where = f"{path}: line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({str(error).splitlines()[0]}): write one object per line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__} where an object is needed: write "
                         '{"problem": ..., "solution": ..., "answer": ...}')
    name = next((name for name in ("problem", "question", "prompt") if name in row), "problem")
    problem, solution, answer = row.get(name), row.get("solution"), row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    checks = (name, problem, True), ("solution", solution, need_solution), ("answer", answer, False)
    for field, value, needed in checks:
        if value is None and needed:
            raise InputError(f"{where}: field '{field}' is missing: add it")
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where}: field '{field}' must be text, got {type(value).__name__}: put it in quotes")
        if needed and not value.strip():
            raise InputError(f"{where}: field '{field}' is empty: fill it in or remove the line")
    if answer is None:
        if solution is None:
            raise InputError(f"{where}: field 'answer' is missing: add it, or a solution that ends in \\boxed{{...}}")
        answer = reward.extract_answer(solution) or ""  # without a box: ungradable
    return Problem(problem, solution or "", answer, number)


def load_model(name: str, dtype: torch.dtype, device: torch.device, scored: bool = True):
    """(model, tokenizer) from a checkpoint directory or a hub id; no code from the hub is run.

    InputError if there is no such model, `rollout.sample` cannot run it, `teacher.read` cannot score with it (unless it
    need not: `scored`), or its tokenizer has no chat template. Also chooses the number of threads that suits it.
    """
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"{name}: no such model directory: check the path (--model)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    except Exception as error:  # a missing, damaged, foreign or too large model: libraries raise a dozen types
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{name}: cannot load the model ({type(error).__name__}: {reason}): check --model, a "
                         "checkpoint directory or a hub id") from None
    try:
        rollout.attention_windows(model)
        if scored:
            teacher.check_head(model)
    except ValueError as error:
        raise InputError(f"{name}: {error}: choose another --model") from None
    if not tokenizer.chat_template:
        raise InputError(f"{name}: the tokenizer has no chat template: take an instruction-tuned model, or set "
                         "tokenizer.chat_template and save the tokenizer (--model)")
    choose_threads(sum(parameter.numel() for parameter in model.parameters()))
    return model, tokenizer


def load_adapter(model, path: str | Path) -> None:
    """lora.load_adapter; InputError for whatever is wrong with the files."""
    try:
        lora.load_adapter(model, path)
    except Exception as error:  # a missing, foreign or damaged adapter: libraries raise a dozen types
        raise InputError(f"{path}: cannot load the adapter ({type(error).__name__}: {error}): check --adapter, a "
                         "directory with adapter_config.json and adapter_model.safetensors") from None
