"""Checkpoints that are complete or not there at all, and JSONL logs that agree with them after a
resume.

    run/checkpoints/step-000025/adapter/      the LoRA adapter, in PEFT's format                     (lora.py)
                                state.pt      optimizer, every rank's random state, other tensors of the method
                                state.json    step, running advantage, other numbers of the method, checksums

A directory is filled under another name, flushed to disk and renamed: a kill at any moment leaves
the earlier ones as they were. Nothing is unpickled: tensors are read with weights_only, numbers
from JSON."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

import lora
from support.data import digest
from support.distributed import Ranks
from support.errors import DAMAGED, InputError, LocalError, reason


@contextmanager
def locked(path: Path):
    """Hold the lock file `path`, removed at the end; BlockingIOError if another process holds
    it."""
    while True:
        with path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:  # its holder removed it after we had opened it
                continue
            if os.fstat(lock.fileno()).st_size:
                raise OSError(f"{path} is not empty, so it is no lock of ours")
            try:
                return (yield)
            finally:
                path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path):
    """LocalError with the path for whatever goes wrong inside: of a full disk alone OSError,
    RuntimeError (torch) and types of their own (safetensors, tokenizers)."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise LocalError(
            f"{path}: cannot be written ({reason(error)}): free space, or see to it that the "
            "directory is there and can be written; what was complete before is untouched"
        ) from None


@contextmanager
def atomic_directory(path: Path):
    """A directory to fill; it appears under its name only when complete and on disk, in place of an
    older one, with the permissions of the umask. If anything goes wrong, nothing is left."""
    work, older = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old.tmp")
    try:
        with writing(path):
            shutil.rmtree(work, ignore_errors=True)
            # but not what is above it: that was there, and somebody took it away
            path.parent.mkdir(exist_ok=True)
            work.mkdir()
            yield work
            os.umask(umask := os.umask(0))
            for entry in [*work.rglob("*"), work]:
                # safetensors writes 0600
                entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)
                _flush(entry)
            if path.exists():
                shutil.rmtree(older, ignore_errors=True)  # of an export that was killed
                os.rename(path, older)
            os.rename(work, path)
            _flush(path.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(older, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace the file as a whole."""
    with writing(path):
        partial = path.with_name(path.name + ".tmp")
        partial.write_text(text, encoding="utf-8")
        _flush(partial)
        os.replace(partial, path)


def append_jsonl(path: Path, rows: list[dict]) -> None:
    with writing(path), path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path, take: Callable[[dict], None], may_be_cut: bool = True) -> int:
    """take(row) for every line, the last of which may have been cut off by a kill; returns how many
    lines there are. InputError for a line that is damaged or that `take` cannot use."""
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                take(json.loads(line))
        except DAMAGED as error:
            if number < len(lines) or not may_be_cut:
                raise InputError(
                    f"{path}: line {number}: cannot be used ({reason(error)}): correct it, or "
                    "remove the line"
                ) from None
    return len(lines)


def drop_later_steps(path: Path, step: int) -> None:
    """Forget the rows of steps after the checkpoint that a resumed run starts from: they are made
    again. Warns of earlier steps that are missing; InputError for a damaged line."""
    kept, steps = [], set()

    def take(row: dict) -> None:
        if row["step"] <= step:
            kept.append(row)
            steps.add(row["step"])

    is_there = path.exists() and read_jsonl(path, take) > 0
    if is_there and not step:
        print(
            f"{path}: warning: there is no checkpoint, the run starts again and drops these lines",
            file=sys.stderr,
        )
    if missing := set(range(1, step + 1)) - steps:
        print(
            f"{path}: warning: {len(missing)} of the {step} steps done have no line, first "
            f"step {min(missing)}",
            file=sys.stderr,
        )
    partial = path.with_name(path.name + ".tmp")
    partial.unlink(missing_ok=True)
    append_jsonl(partial, kept)
    os.replace(partial, path)


def save(path: Path, model, optimizer, ranks: Ranks, tensors: dict, numbers: dict) -> None:
    """Write adapter, optimizer, random states (for dropout; all else is a function of seed and
    step), `tensors` and `numbers`; a checkpoint that is there is left alone. Every rank calls it,
    rank 0 writes."""
    rng = {"cpu": ranks.gather(torch.get_rng_state())}
    if ranks.device.type == "cuda":
        rng["cuda"] = ranks.gather(torch.cuda.get_rng_state())
    if ranks.rank == 0 and not path.exists():
        with atomic_directory(path) as work:
            lora.save_adapter(model, work / "adapter")
            torch.save(
                {"optimizer": optimizer.state_dict(), "rng": rng, **tensors}, work / "state.pt"
            )
            write_json(work / "state.json", numbers | {"sha256": _checksums(work, numbers)})
    ranks.barrier()


def _checksums(path: Path, numbers: dict) -> dict[str, str]:
    files = [*sorted(path.glob("adapter/*")), path / "state.pt"]
    return {str(file.relative_to(path)): digest(file) for file in files} | {
        "state.json": hashlib.sha256(json.dumps(numbers).encode()).hexdigest()
    }


def load_latest(
    directory: Path, model, optimizer, ranks: Ranks, load_state: Callable[[dict, dict], None]
) -> None:
    """Put adapter, optimizer and this rank's random state back from the last complete checkpoint,
    if there is one, and give the tensors and numbers of `save` to `load_state`. InputError if the
    checkpoint is damaged."""
    path = latest(directory)
    if path is None:
        if os.path.lexists(directory) and not directory.is_dir():
            raise InputError(
                f"{directory}: no directory can be seen here: mount its disk, or put it back"
            )
        return
    try:
        numbers = dict(json.loads((path / "state.json").read_text()))
        written = numbers.pop("sha256")
        for name, value in _checksums(path, numbers).items():
            if value != written.get(name):
                raise ValueError(f"{name} is not as it was written")
        lora.load_adapter(model, path / "adapter")
        tensors = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(tensors["optimizer"])
        # torch crashes on a view into a larger tensor
        torch.set_rng_state(tensors["rng"]["cpu"][ranks.rank].clone())
        if "cuda" in tensors["rng"]:
            torch.cuda.set_rng_state(tensors["rng"]["cuda"][ranks.rank].clone())
        load_state(tensors, numbers)
    except Exception as error:  # torch and safetensors raise a dozen types for a damaged file
        raise InputError(
            f"{path}: damaged checkpoint, or config.json was edited ({reason(error)}): put that "
            "back, or remove this directory to resume from the checkpoint before it"
        ) from None


def latest(directory: Path) -> Path | None:
    """The last complete checkpoint in `directory`, None if there is none."""
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)
