"""What comes in from outside: problems from JSONL files, models from disk or from the hub.

A data file has one JSON object per line: {"problem": "2+3?", "solution": "2+3=5. \\boxed{5}",
"answer": "5"}. `question` or `prompt` may stand for `problem`; without an `answer` the last box of
the solution is taken; evaluation does not need a solution; `restated` may hold the problem in other
words, for family/. A user's mistake raises InputError, whose text is one line: file, line, field,
and what to do.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

import lora
import reward
import rollout
import teacher
from support.distributed import choose_threads
from support.errors import InputError, reason
from support.flags import environment_number

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# in names of its layers; those of MLPs have none of these
ATTENTION = re.compile("attn|attention|mixer|mamba|conv")
ADAPTER = f"check --adapter, a directory with {' and '.join(ADAPTER_FILES)}"
# files that make a model what it is
IDENTITY = ("*.safetensors", "*.bin", "*config.json", "tokenizer.json", "*.jinja")


@dataclass(frozen=True)
class Problem:
    """One line of a data file. solution is "" where the file has none; line counts from 1."""

    problem: str
    solution: str
    answer: str
    line: int
    restated: str = ""  # the problem in other words, where the file has it


def load_problems(
    path: str | Path, need_solution: bool = True, skip_ungradable: bool = False
) -> tuple[list[Problem], int]:
    """(problems of a JSONL file, number of rows left out); blank lines are passed over.

    A gold answer that does not equal itself under reward.is_equal could never be rewarded. Such
    rows raise InputError with their line numbers, or are left out and counted if `skip_ungradable`.
    """
    problems, ungradable = [], []
    for number, line in enumerate(read_utf8(Path(path)).splitlines(), 1):
        if not line.strip():
            continue
        problem = _parse(path, number, line, need_solution)
        (problems if reward.is_equal(problem.answer, problem.answer) else ungradable).append(
            problem
        )
    if ungradable and not skip_ungradable:
        lines = ", ".join(str(problem.line) for problem in ungradable[:20]) + (
            ", ..." if len(ungradable) > 20 else ""
        )
        raise InputError(
            f"{path}: line {lines}: field 'answer': {len(ungradable)} gold answers are missing, "
            "or the verifier cannot grade them: correct them or leave these rows out with "
            "--skip-ungradable"
        )
    if not problems:
        raise InputError(f"{path}: no problem in this file: it needs one JSON object per line")
    return problems, len(ungradable)


def read_utf8(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            # a pipe cannot be read twice, nor be recognised later
            raise OSError("it is a directory, a pipe or a device")
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(
            f"{path}: no such data file, or it cannot be read ({reason(error)}): check the path "
            "(--data, --eval-data, --from)"
        ) from None
    encoding = "gzip" if content.startswith(b"\x1f\x8b") else json.detect_encoding(content[:4])
    if not encoding.startswith("utf-8"):
        remedy = (
            "unpack it with gunzip"
            if encoding == "gzip"
            else f"convert it with iconv -f {encoding} -t utf-8"
        )
        raise InputError(f"{path}: this is {encoding.upper()}, UTF-8 text is needed: {remedy}")
    return content


def _parse(path: Path, number: int, line: bytes, need_solution: bool) -> Problem:
    where = f"{path}: line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: not valid JSON ({str(error).splitlines()[0]}): write one object per line"
        ) from None
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: a JSON {type(row).__name__} where an object is needed: write "
            '{"problem": ..., "solution": ..., "answer": ...}'
        )
    name = next((name for name in ("problem", "question", "prompt") if name in row), "problem")
    problem, solution, answer, restated = (
        row.get(name),
        *map(row.get, ("solution", "answer", "restated")),
    )
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        # 1e400 is ungradable
        answer = "" if answer in (math.inf, -math.inf) or answer != answer else str(answer)
    for field, value, needed in (
        (name, problem, True),
        ("solution", solution, need_solution),
        ("answer", answer, False),
        ("restated", restated, False),
    ):
        _check_field(where, field, value, needed)
    if answer is None:
        if solution is None:
            raise InputError(
                f"{where}: field 'answer' is missing: add it, or a solution that ends in "
                f"\\boxed{{...}}"
            )
        answer = reward.extract_answer(solution) or ""  # without a box: ungradable
    return Problem(problem, solution or "", answer, number, restated or "")


def _check_field(where: str, field: str, value, needed: bool) -> None:
    if value is None and needed:
        raise InputError(f"{where}: field '{field}' is missing: add it")
    if value is not None and not isinstance(value, str):
        raise InputError(
            f"{where}: field '{field}' must be text, got {type(value).__name__}: put it in quotes"
        )
    if needed and not value.strip():
        raise InputError(f"{where}: field '{field}' is empty: fill it in or remove the line")
    if half := re.search("[\ud800-\udfff]", value or ""):
        raise InputError(
            f"{where}: field '{field}' has half of a character, {ascii(half[0])}: write it whole"
        )


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(name: str) -> str:
    """SHA-256 over the files of a model, of large ones the size, the first and the last mebibyte:
    that covers all names and shapes of weights, and nobody has to read gigabytes."""
    folder, found = Path(cached_file(name, "config.json")).parent, hashlib.sha256()
    for path in sorted({path for pattern in IDENTITY for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            found.update(f"{path.name} {path.stat().st_size} ".encode() + file.read(2**20))
            file.seek(max(file.tell(), path.stat().st_size - 2**20))
            found.update(file.read())
    return found.hexdigest()


def check_place(name: str) -> None:
    """InputError for the name of a model that can only be a directory, and is none."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"{name}: no such model directory: check the path (--model)")


def load_model(name: str, dtype: torch.dtype, device: torch.device, scored: bool = True):
    """(model, tokenizer) from a checkpoint directory or a hub id; no code that comes with them is
    run.

    InputError if there is no such model, weights are missing, of another shape or not finite,
    `rollout.sample` cannot run it, `teacher.read` cannot score with it (unless it need not:
    `scored`), or its tokenizer has no chat template that works. Also chooses the number of threads
    that suits it.
    """
    check_place(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        settings = vars(config.get_text_config())
        dropout = {
            key: value
            for key, value in settings.items()
            if "drop" in key and isinstance(value, float)
        }
        settings |= dict.fromkeys(dropout, 0.0)
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        # for an export: no layer reads it any more
        vars(model.config.get_text_config()).update(dropout)
        model.to(device)
    # a missing, damaged, foreign or too large model: libraries raise a dozen types
    except Exception as error:
        raise InputError(
            f"{name}: cannot load the model ({reason(error)}): check --model, a checkpoint "
            "directory or a hub id, which must not need code of its own"
        ) from None
    wrong = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if wrong := wrong or [
        key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()
    ]:
        raise InputError(
            f"{name}: {len(wrong)} weights are missing, of another shape or not finite, first "
            f"{wrong[0]}: the checkpoint is damaged or incomplete, get it again (--model)"
        )
    if found["unexpected_keys"] and environment_number("RANK", 0) == 0:
        print(
            f"{name}: warning: {len(found['unexpected_keys'])} weights of the checkpoint have no "
            f"place in the model, first {min(found['unexpected_keys'])}",
            file=sys.stderr,
        )
    try:
        rollout.stop_ids(model, tokenizer)
        rollout.check_model(model)
        if scored:
            teacher.check_head(model)
    except Exception as error:  # a model of unknown kind raises what it likes
        what = reason(error).removeprefix("ValueError: ")
        raise InputError(
            f"{name}: cannot be sampled or scored: {what}: choose another --model, "
            "docs/models.md has a table"
        ) from None
    _check_tokenizer(name, model, tokenizer, scored)
    choose_threads(sum(parameter.numel() for parameter in model.parameters()))
    return model, tokenizer


def _check_tokenizer(name: str, model, tokenizer, has_teacher: bool) -> None:
    if not tokenizer.chat_template:
        raise InputError(
            f"{name}: the tokenizer has no chat template: take an instruction-tuned model, or set "
            "tokenizer.chat_template and save the tokenizer (--model)"
        )
    try:
        prompts = [
            teacher.encode(tokenizer, teacher.teacher_messages(f"{n}?", "2"), thinking)
            for thinking in (False, True)
            for n in (1, 2)
        ]
    except Exception as error:  # jinja2 and templates themselves raise what they like
        raise InputError(
            f"{name}: the chat template does not work ({reason(error)}): correct "
            "chat_template.jinja, or choose another --model"
        ) from None
    if any(one == two for one, two in zip(prompts[::2], prompts[1::2], strict=True)):
        raise InputError(
            f"{name}: the prompt does not depend on the problem: files of the tokenizer are "
            "missing, or the chat template leaves the messages out (--model)"
        )
    for thinking in (False, True) if has_teacher else ():
        asked = [
            teacher.student_messages("1?"),
            *(teacher.teacher_messages("1?", s) for s in ("2", "2 " * 500)),
        ]
        texts = [
            teacher.encode(tokenizer, messages, thinking, tokenize=False) for messages in asked
        ]
        ends = {text.rpartition(teacher.INSTRUCTION)[2] for text in texts}
        if len(ends) > 1:
            shown = " and ".join(repr(end)[:80] for end in sorted(ends))
            raise InputError(
                f"{name}: student and teacher must be asked alike, but their prompts end in "
                f"{shown}: correct chat_template.jinja (--model)"
            )
    if (last := max(map(max, prompts))) >= (rows := model.get_input_embeddings().num_embeddings):
        raise InputError(
            f"{name}: the tokenizer has token {last}, the model {rows} embeddings (--model)"
        )


def add_adapter(model, rank: int, alpha: float, targets: Sequence[str] = lora.TARGETS) -> str:
    """lora.add_lora; returns a line that says what it covers. InputError if the model has no place
    for it, if a name is not there, or if all of the attention (or what stands in its place), or all
    of the MLPs, would be left out."""

    def ends(names: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(map(lora.short_name, names)))

    layers, is_all = list(lora.linear_layers(model)), lora.ALL_LINEAR in targets
    chosen = [name for name in layers if is_all or lora.short_name(name) in targets]
    rest = [name for name in layers if name not in set(chosen)]
    if unknown := {*targets} - {*lora.TARGETS, lora.ALL_LINEAR, *ends(layers)}:
        raise InputError(
            "--lora-targets: no layer that can be adapted is named "
            f"{', '.join(sorted(unknown))}: there are {', '.join(ends(layers))}"
        )
    for part, is_inside in (
        ("attention", ATTENTION.search),
        ("MLPs", lambda name: not ATTENTION.search(name)),
    ):
        missing = list(filter(is_inside, rest))
        if missing and not any(map(is_inside, chosen)):
            raise InputError(
                f"the adapter would leave out all of the {part}: say --lora-targets "
                f"{' '.join(ends(chosen + missing))}, or {lora.ALL_LINEAR}"
            )
    try:
        lora.add_lora(model, rank, alpha, lora.ALL_LINEAR if is_all else tuple(targets))
    except ValueError as error:
        raise InputError(
            f"{error}: change --lora-rank or --lora-targets, or choose another --model"
        ) from None
    has_experts = any(name.endswith("experts") for name, _ in model.named_modules())
    return (
        f"adapter: {len(chosen)} of {len(layers)} linear layers ({', '.join(ends(chosen))})"
        + (f"; left out: {', '.join(ends(rest))}" if rest else "")
        + ("; routers and experts stay frozen" if has_experts else "")
    )


def check_files(models: list[str], adapters: list[str]) -> dict[str, str]:
    """InputError if a model's directory or an adapter is not there. Returns digests of the
    adapters' files."""
    for name in models:
        check_place(name)
    found = {}
    for path in adapters:
        try:
            found |= {f"{path}/{name}": digest(Path(path) / name) for name in ADAPTER_FILES}
        except OSError as error:
            raise InputError(
                f"{path}: cannot load the adapter ({reason(error)}): {ADAPTER}"
            ) from None
    return found


def load_adapter(model, path: str | Path, merge: bool = False) -> None:
    """lora.load_adapter, and lora.merge; InputError for whatever is wrong with the files."""
    try:
        lora.load_adapter(model, path)
        if merge:
            lora.merge(model)
    # a missing, foreign or damaged adapter: libraries raise a dozen types
    except Exception as error:
        raise InputError(f"{path}: cannot load the adapter ({reason(error)}): {ADAPTER}") from None
