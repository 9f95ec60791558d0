r"""What comes in from outside: problems from JSONL files, models from disk or from the hub.

A data file is UTF-8 text with one JSON object per line:

    {"problem": "2+3?", "solution": "2+3=5. \\boxed{5}", "answer": "5"}

`question` or `prompt` may stand for `problem`. Without an `answer` the last box of the solution is
taken. An answer is unwrapped (support/golds.py); a worked answer is the solution too, if there is
none. Evaluation needs no solution. `restated`, the problem in other words, is for family/. A user's
mistake raises InputError, whose text is one line: file, line, field, and what to do.
"""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import cached_file

import lora
import reward
import rollout
import teacher
from support import golds, quantised
from support.distributed import choose_threads
from support.errors import InputError, reason
from support.flags import environment_number

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# These words occur in names of attention layers, and of layers in their place (Mamba, convolution).
# Names of MLP layers have none of them.
ATTENTION = re.compile("attn|attention|mixer|mamba|conv")
ADAPTER = f"check --adapter, a directory with {' and '.join(ADAPTER_FILES)}"
MEBIBYTE = 2**20
# LaTeX commands whose backslash was not doubled: JSON reads \t as a tab, so \text becomes a tab and
# "ext". After a tab "an", "o" and "op" may be words, as in "an apple".
LOST_COMMAND = re.compile(
    r"\x08[A-Za-z]*"
    r"|\f(?:rac|rak|rown|box|ramebox|lat|loor|orall|ootnote)(?![A-Za-z])"
    r"|\t(?:ext(?:bf|it|rm|sc|sf|tt|normal|style)?|imes|heta|anh|au|frac|binom|herefore|ilde|ag"
    r"|riangle(?:q|left|right|down)?|(?:an|o(?=[ \\0-9])|op)(?! [a-z]{2}|\t))(?![A-Za-z])"
    r"|\r(?:ight|ightarrow|ightleftharpoons|ho|angle|brace|brack|vert|Vert|floor|ceil|m)(?![A-Za-z])"
)
# A line feed stands in any text of several lines, so only answers are searched.
LOST_IN_ANSWER = re.compile(
    r"\n(?:abla|atural|eq|ewline|ot|otin|eg(?!\.)|mid(?!-)|parallel|e(?! ?[=^.:,)])|u(?! ?[=^-]))"
    r"(?![A-Za-z])"
)
# files that make a model what it is
IDENTITY = ("*.safetensors", "*.bin", "*.gguf", "*config.json", "tokenizer.json", "*.jinja")
OTHERWISE = {  # than adding a field
    "solution": ", or show the teacher the answer alone: python -m family --method cl-egrsd "
    "--teacher-context answer"
}


@dataclass(frozen=True)
class Problem:
    """A problem of a data file; line counts from 1. solution is "" where the file has none."""

    problem: str
    solution: str
    answer: str
    line: int
    restated: str = ""  # the problem in other words, where the file has it


def load_problems(
    path: str | Path, need_solution: bool = True, skip_ungradable: bool = False
) -> tuple[list[Problem], int]:
    """(problems of a JSONL file, number of problems left out); blank lines are passed over.

    A gold answer that does not equal itself under reward.is_equal could never be rewarded, and one
    that is not the last box of its solution is wrong, or the solution is. Such problems raise
    InputError with their lines, or are left out and counted if `skip_ungradable`.
    """
    if not Path(path).is_file():  # a pipe cannot be read twice, nor be recognised later
        raise InputError(f"{path}: no such data file: check the path (--data, --eval-data)")
    lines = Path(path).read_bytes().splitlines()
    problems = []
    ungradable = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            problem = _parse(path, number, line, need_solution)
            is_gradable = reward.is_equal(problem.answer, problem.answer)
            is_gradable = is_gradable and golds.agrees(problem.solution, problem.answer)
            (problems if is_gradable else ungradable).append(problem)
    if ungradable and not skip_ungradable:
        first = ", ".join(str(problem.line) for problem in ungradable[:20])
        raise InputError(
            f"{path}: line {first}: field 'answer': {len(ungradable)} gold answers are missing, "
            "differ from the last box of their solution, or the verifier cannot grade them: correct "
            "them, or leave these problems out with --skip-ungradable"
        )
    if not problems:
        raise InputError(f"{path}: no problem in this file: it needs one JSON object per line")
    return problems, len(ungradable)


def _parse(path, number, line, need_solution):
    where = f"{path}: line {number}"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise InputError(
            f"{where}: not valid JSON in UTF-8 ({error}): write one object per line, and every "
            "backslash twice"
        ) from None
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a JSON {type(record).__name__} where an object is needed: write "
            '{"problem": ..., "solution": ..., "answer": ...}'
        )
    names = ("problem", "question", "prompt")
    name = next((name for name in names if record.get(name) is not None), "problem")
    answer = record["answer"] = _answer_text(record.get("answer"))
    if not record.get("solution") and golds.is_worked(str(answer)):
        record["solution"] = answer
    for field in (name, "answer", "restated"):
        _check_field(where, field, record.get(field), field == name)
    solution = record.get("solution") or ""
    if answer is None or not answer.strip():
        answer = solution if reward.extract_answer(solution) else ""  # without a box: ungradable
    gold = golds.gold_answer(answer)
    is_none = answer and not gold  # ungradable: then the solution does not matter
    _check_field(where, "solution", record.get("solution"), need_solution and not is_none)
    return Problem(record[name], solution, gold, number, record.get("restated") or "")


def _answer_text(answer):
    """A number, or the element of a list of one, as text; what has several answers has none."""
    while isinstance(answer, list):
        answer = answer[0] if len(answer) == 1 else "N/A"
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    return str(answer) if is_number else answer


def _check_field(where, field, value, is_needed):
    if value is None:
        if is_needed:
            raise InputError(
                f"{where}: field '{field}' is missing: add it{OTHERWISE.get(field, '')}"
            )
        return
    if not isinstance(value, str):
        raise InputError(
            f"{where}: field '{field}' must be text, got {type(value).__name__}: put it in quotes"
        )
    if is_needed and not value.strip():
        raise InputError(
            f"{where}: field '{field}' is empty: fill it in or remove the line"
            f"{OTHERWISE.get(field, '')}"
        )
    lost = LOST_COMMAND.search(value) or field == "answer" and LOST_IN_ANSWER.search(value)
    if lost:
        command = json.dumps(lost[0]).strip('"')  # as it was written
        raise InputError(
            f"{where}: field '{field}': {command} has one backslash, which JSON reads as a control "
            f"character: double it, \\{command}"
        )


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(name: str) -> str:
    """SHA-256 over the files of a model: of each the name, the size, the first and the last
    mebibyte. That covers names and shapes of all weights, and nobody has to read gigabytes."""
    folder = _folder(name)
    files = {path for pattern in IDENTITY for path in folder.glob(pattern)}
    found = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        found.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            found.update(file.read(MEBIBYTE))
            file.seek(max(file.tell(), size - MEBIBYTE))
            found.update(file.read())
    return found.hexdigest()


def _folder(name):
    """Where the files of a model are."""
    return Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent


def check_place(name: str) -> None:
    """InputError for the name of a model that can only be a directory, and is none."""
    if name.endswith(".gguf"):
        raise InputError(f"{name}: name the directory that holds this file (--model)")
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise InputError(f"{name}: no such model directory: check the path (--model)")


def load_model(name: str, dtype: torch.dtype, device: torch.device, scored: bool = True):
    """(model, tokenizer) from a checkpoint directory or a hub id, or from a directory with a .gguf
    file, which is dequantised. Code that comes with them is not run. Also chooses the number of
    threads that suits the model.

    InputError if there is no such model; if it is quantised, unless by GGUF; if weights are missing,
    of another shape or not finite; if `rollout.sample` cannot run it; if `teacher.read` cannot
    score with it, where it is `scored`; if its tokenizer has no chat template that works.
    """
    check_place(name)
    gguf = quantised.gguf_file(name)
    try:
        config = AutoConfig.from_pretrained(name, gguf_file=gguf, trust_remote_code=False)
        quantised.check_config(name, config)
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf, trust_remote_code=False)
        saved = config.dtype
        model, found = _without_dropout(name, config, gguf, dtype)
        if gguf:
            quantised.check_gguf(f"{name}/{gguf}", model)
        model.to(device)
    except InputError:
        raise
    except Exception as error:  # for a missing or damaged model libraries raise a dozen types
        raise InputError(
            f"{name}: cannot load the model ({reason(error)}): check --model, a checkpoint "
            "directory or a hub id, which must not need code of its own"
        ) from None
    _check_weights(name, model, found)
    if saved != model.dtype == torch.bfloat16:
        _warn(
            f"{name}: its weights are rounded to bfloat16, which hides small changes of an earlier "
            "training; train.py --no-bf16 keeps them"
        )
    try:
        _set_stop_tokens(model, tokenizer)
        rollout.check_model(model)
        if scored:
            teacher.check_head(model)
    except Exception as error:  # a model of unknown kind raises what it likes
        raise InputError(
            f"{name}: cannot be sampled or scored ({reason(error)}): choose another --model, "
            "docs/models.md has a table"
        ) from None
    _check_tokenizer(name, model, tokenizer, scored)
    choose_threads(sum(parameter.numel() for parameter in model.parameters()))
    return model, tokenizer


def _without_dropout(name, config, gguf, dtype):
    """(model, what transformers says of its weights). Its layers have no dropout, its config keeps
    the rates for an export."""
    settings = vars(config.get_text_config())
    rates = {}
    for key, value in settings.items():
        if "drop" in key and isinstance(value, float):
            rates[key] = value
    settings |= dict.fromkeys(rates, 0.0)  # `settings` are the attributes of the config itself
    model, found = AutoModelForCausalLM.from_pretrained(
        name,
        config=config,
        gguf_file=gguf,
        quantization_config=GgufConfig(dequantize=True) if gguf else None,
        dtype=dtype,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    vars(model.config.get_text_config()).update(rates)
    return model, found


def _check_weights(name, model, found):
    wrong = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    wrong += [key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if wrong:
        raise InputError(
            f"{name}: {len(wrong)} weights are missing, of another shape or not finite, first "
            f"{wrong[0]}: the checkpoint is damaged or incomplete, get it again (--model)"
        )
    unexpected = found["unexpected_keys"]
    if unexpected:
        _warn(
            f"{name}: warning: {len(unexpected)} weights of the checkpoint have no place in the "
            f"model, first {min(unexpected)}"
        )


def _warn(line):
    if environment_number("RANK", 0) == 0:
        print(line, file=sys.stderr)


def _set_stop_tokens(model, tokenizer):
    """generation_config names every token at which completions stop, here and in an export: those
    of tokenizer, config and generation_config, and the one that ends a turn in the chat template.
    ValueError if there is none, or if generation_config could not be exported."""
    generation = model.generation_config
    generation.eos_token_id = rollout.stop_ids(model, tokenizer, stop_sources(tokenizer))
    try:
        generation.validate(strict=True)
    except ValueError:  # mostly there is a temperature, and do_sample is missing
        generation.do_sample = True
        generation.validate(strict=True)


def stop_sources(tokenizer) -> dict[int, str]:
    """Stop tokens, and what names them; the model's configs may name more."""
    found = {}
    if tokenizer.eos_token_id is not None:
        found[tokenizer.eos_token_id] = "tokenizer"
    end = teacher.turn_end(tokenizer)
    if end is not None:
        found[end] = "chat template"
    return found


def _check_tokenizer(name, model, tokenizer, scored):
    """InputError if prompts do not depend on the problem, or have tokens that the model lacks, or if
    reward.py would take a thought for an answer, or an answer for a thought.

    If `scored`, InputError also if the prompts of student and teacher end differently after the
    instruction. The teacher's is tried with a short and with a long solution.
    """
    solutions = ("2", "2 " * 500)
    embeddings = model.get_input_embeddings().num_embeddings
    for thinking in (False, True):
        asked = [teacher.student_messages("1?")]
        asked += [teacher.teacher_messages("1?", solution) for solution in solutions]
        try:
            texts = [teacher.encode(tokenizer, one, thinking, tokenize=False) for one in asked]
            one, two = (
                teacher.encode(tokenizer, teacher.teacher_messages(problem, "2"), thinking)
                for problem in ("1?", "2?")
            )
        except Exception as error:  # jinja2 and templates themselves raise what they like
            raise InputError(
                f"{name}: the chat template does not work ({reason(error)}): correct "
                "chat_template.jinja, or choose another --model"
            ) from None
        if one == two:
            raise InputError(
                f"{name}: the prompt does not depend on the problem: files of the tokenizer are "
                "missing, or the chat template leaves the messages out (--model)"
            )
        last = max(one + two)
        if last >= embeddings:
            raise InputError(
                f"{name}: the tokenizer has token {last}, the model {embeddings} embeddings (--model)"
            )
        ends = {text.rpartition(teacher.INSTRUCTION)[2] for text in texts}
        if scored and len(ends) > 1:
            shown = " and ".join(map(repr, sorted(ends)))
            raise InputError(
                f"{name}: student and teacher must be asked alike, but their prompts end in "
                f"{shown}: correct chat_template.jinja (--model)"
            )
    opening, closing, _ = teacher.assistant_turn(tokenizer)
    start = teacher.prompt_end(tokenizer, True) + opening
    is_open = reward.after_thought("", start) is None
    if closing.strip() and not (is_open and reward.after_thought(closing + "2", start)):
        raise InputError(
            f"{name}: the chat template writes {closing!r} after a thought, and reward.py does not "
            "know how it marks thoughts: add that to _MARK, or choose another --model"
        )


def add_adapter(model, rank: int, alpha: float, targets: Sequence[str] = lora.TARGETS) -> str:
    """lora.add_lora; returns a line that says what it covers.

    InputError if the model has no place for it, if a name is not there, or if all of the attention
    (or what stands in its place), or all of the MLPs, would be left out.
    """
    layers = list(lora.linear_layers(model))
    is_all = lora.ALL_LINEAR in targets
    unknown = {*targets} - {*lora.TARGETS, lora.ALL_LINEAR, *_ends(layers)}
    if unknown:
        raise InputError(
            "--lora-targets: no layer that can be adapted is named "
            f"{', '.join(sorted(unknown))}: there are {', '.join(_ends(layers))}"
        )
    chosen = [name for name in layers if is_all or lora.short_name(name) in targets]
    rest = [name for name in layers if name not in chosen]
    attention = {name for name in layers if ATTENTION.search(name)}
    for part, inside in (("attention", attention), ("MLPs", {*layers} - attention)):
        if inside and inside <= {*rest}:
            wanted = _ends(chosen + [name for name in layers if name in inside])
            raise InputError(
                f"the adapter would leave out all of the {part}: say --lora-targets "
                f"{' '.join(wanted)}, or {lora.ALL_LINEAR}"
            )
    try:
        lora.add_lora(model, rank, alpha, lora.ALL_LINEAR if is_all else tuple(targets))
    except ValueError as error:
        raise InputError(
            f"{error}: change --lora-rank or --lora-targets, or choose another --model"
        ) from None
    line = f"adapter: {len(chosen)} of {len(layers)} linear layers ({', '.join(_ends(chosen))})"
    if rest:
        line += f"; left out: {', '.join(_ends(rest))}"
    return line


def _ends(names):
    """Their last parts, each once."""
    return list(dict.fromkeys(map(lora.short_name, names)))


def check_files(models: list[str], adapters: list[str]) -> dict[str, str]:
    """Digests of the adapters' files. InputError if the directory of a model is not there, OSError if
    a file of an adapter is not. So the user need not wait until other models are evaluated."""
    for name in models:
        check_place(name)
    files = [f"{path}/{name}" for path in adapters for name in ADAPTER_FILES]
    return {name: digest(Path(name)) for name in files}


def load_adapter(model, path: str | Path) -> None:
    """lora.load_adapter; InputError for whatever is wrong with the files. Says so if another base is
    named in them."""
    try:
        base = lora.load_adapter(model, path)
    except Exception as error:  # for a missing or damaged adapter libraries raise a dozen types
        raise InputError(f"{path}: cannot load the adapter ({reason(error)}): {ADAPTER}") from None
    if base and base != model.name_or_path:
        _warn(f"{path}: warning: trained on {base}, not on this model")
