"""Checkpoints that are complete or not there at all, and JSONL logs that agree with them after a
resume.

    run/checkpoints/step-000025/adapter/      the LoRA adapter, in PEFT's format                     (lora.py)
                                state.pt      optimizer, every rank's random state, other tensors of the method
                                state.json    step, running advantage, other numbers of the method, checksums

A directory is filled under another name, flushed to disk and renamed. A kill at any moment leaves
the earlier ones as they were. Loading runs no code from a file: tensors are read with
weights_only, numbers from JSON.
"""

import fcntl
import hashlib
import json
import os
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
    """Hold the lock file `path`, and remove it. BlockingIOError if another process holds it."""
    while True:
        with path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(lock.fileno()).st_nlink:
                continue  # another process deleted it after we opened it: try again
            try:
                return (yield)
            finally:
                path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path):
    """Whatever goes wrong inside becomes a LocalError with the path.

    A full disk alone raises OSError, RuntimeError (torch), and types of safetensors and tokenizers.
    """
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
    """A directory to fill. It takes its name, and the place of an older one, when it is complete
    and on disk. If anything goes wrong before, the older one stays."""
    work = path.with_name(path.name + ".tmp")
    older = path.with_name(path.name + ".old.tmp")
    try:
        with writing(path):
            shutil.rmtree(work, ignore_errors=True)
            path.parent.mkdir(exist_ok=True)
            work.mkdir()
            yield work
            umask = os.umask(0)
            os.umask(umask)
            for entry in [*work.rglob("*"), work]:
                mode = 0o777 if entry.is_dir() else 0o666
                entry.chmod(mode & ~umask)  # safetensors writes 0600
                _flush(entry)
            if path.exists():
                shutil.rmtree(older, ignore_errors=True)  # a killed export leaves it
                os.rename(path, older)
            os.rename(work, path)
            _flush(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)  # it is there only after a failure
    shutil.rmtree(older, ignore_errors=True)


def _flush(path):
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


def append_jsonl(path: Path, records: list[dict]) -> None:
    with writing(path), path.open("a") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def read_jsonl(path: Path, take: Callable[[dict], None], may_be_cut: bool = True) -> None:
    """take(record) for every line. InputError for a line that is damaged or that `take` cannot use.

    A kill may have cut the last line. If it `may_be_cut`, it is passed over in that case.
    """
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                take(json.loads(line.decode()))
        except DAMAGED as error:
            is_last = number == len(lines)
            if not (is_last and may_be_cut):
                raise InputError(
                    f"{path}: line {number}: cannot be used ({reason(error)}): correct it, or "
                    "remove the line"
                ) from None


def drop_later_steps(path: Path, step: int) -> None:
    """Forget the records of steps after the checkpoint that a resumed run starts from: they are
    made again."""
    kept = []

    def take(record):
        if record["step"] <= step:
            kept.append(record)

    if path.exists():
        read_jsonl(path, take)
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


def save(path: Path, model, optimizer, ranks: Ranks, tensors: dict, numbers: dict) -> None:
    """Write adapter, optimizer, random states, `tensors` and `numbers`. Every rank calls it, rank 0
    writes.

    The random states are those of torch, for methods or models that use them. The random numbers of
    the core depend only on seed and step. A checkpoint that is there is left alone.
    """
    rng = {"cpu": ranks.gather(torch.get_rng_state())}
    if ranks.device.type == "cuda":
        rng["cuda"] = ranks.gather(torch.cuda.get_rng_state())
    if ranks.rank == 0 and not path.exists():
        with atomic_directory(path) as work:
            lora.save_adapter(model, work / "adapter")
            tensors = tensors | {"optimizer": optimizer.state_dict(), "rng": rng}
            torch.save(tensors, work / "state.pt")
            write_json(work / "state.json", numbers | {"sha256": _checksums(work, numbers)})
    ranks.barrier()


def _checksums(path, numbers):
    """Of all that a checkpoint holds. Tensors with a flipped bit would load without a word."""
    found = {"state.json": hashlib.sha256(json.dumps(numbers).encode()).hexdigest()}
    for file in [*sorted(path.glob("adapter/*")), path / "state.pt"]:
        found[str(file.relative_to(path))] = digest(file)
    return found


def load_latest(
    directory: Path, model, optimizer, ranks: Ranks, load_state: Callable[[dict, dict], None]
) -> None:
    """Put adapter, optimizer and this rank's random state back from the last complete checkpoint,
    if there is one. `load_state` gets the tensors and numbers of `save`. InputError if the
    checkpoint is damaged."""
    path = latest(directory)
    if path is None:
        if directory.is_symlink() and not directory.exists():
            raise InputError(f"{directory}: its disk is not there: mount it, or put it back")
        if ranks.rank == 0:
            print(f"{directory}: no checkpoint is here, the run starts again", file=sys.stderr)
        return
    try:
        numbers = json.loads((path / "state.json").read_text())
        written = numbers.pop("sha256")
        for name, value in _checksums(path, numbers).items():
            if value != written[name]:
                raise ValueError(f"{name} is not as it was written")
        lora.load_adapter(model, path / "adapter")
        tensors = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(tensors["optimizer"])
        rng = tensors["rng"]
        # clone: torch crashes on a view into a larger tensor
        torch.set_rng_state(rng["cpu"][ranks.rank].clone())
        if "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"][ranks.rank].clone())
        load_state(tensors, numbers)
    except Exception as error:  # torch and safetensors raise a dozen types for a damaged file
        raise InputError(
            f"{path}: damaged checkpoint, or config.json was edited ({reason(error)}): put that "
            "back, or remove this directory to resume from the checkpoint before it"
        ) from None


def latest(directory: Path) -> Path | None:
    """The last complete checkpoint in `directory`, None if there is none."""
    found = [path for path in directory.glob("step-*") if path.name[5:].isdecimal()]
    return max(found, key=lambda path: int(path.name[5:]), default=None)
