"""Checkpoints that are complete or not there at all, and JSONL logs that agree with them after a resume.

    run/checkpoints/step-000025/adapter/      the LoRA adapter, in PEFT's format                     (lora.py)
                                state.pt      optimizer, every rank's random state, other tensors of the method
                                state.json    step, running advantage, other numbers of the method

A directory is filled under another name, flushed to disk and renamed: a kill at any moment leaves the earlier ones as
they were. Nothing is unpickled: tensors are read with weights_only, numbers from JSON."""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch

import lora
from support.data import InputError
from support.distributed import Ranks


@contextmanager
def atomic_directory(path: Path):
    """A directory to fill; it appears under its name only when complete and on disk, in place of an older one."""
    work = path.with_name(path.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    yield work
    for entry in [*work.rglob("*"), work]:
        _flush(entry)
    older = path.with_name(path.name + ".old.tmp")
    if path.exists():
        shutil.rmtree(older, ignore_errors=True)  # left by a kill before the last line
        os.rename(path, older)
    os.rename(work, path)
    _flush(path.parent)
    shutil.rmtree(older, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_json(path: Path, value: dict) -> None:
    """Replace the file as a whole."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(partial, path)


def append_jsonl(path: Path, rows: list[dict]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def drop_later_steps(path: Path, step: int) -> None:
    """Forget the rows of steps after the checkpoint that a resumed run starts from: they are made again."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # a line cut off by a kill
            break
    partial = path.with_name(path.name + ".tmp")
    partial.write_text("")
    append_jsonl(partial, [row for row in rows if row["step"] <= step])
    os.replace(partial, path)


def save(path: Path, model, optimizer, ranks: Ranks, tensors: dict, numbers: dict) -> None:
    """Write adapter, optimizer, random states (for dropout; all else is a function of seed and step), `tensors` and
    `numbers`; a checkpoint that is there is left alone. Every rank calls it, rank 0 writes."""
    rng = {"cpu": ranks.gather(torch.get_rng_state())}
    if ranks.device.type == "cuda":
        rng["cuda"] = ranks.gather(torch.cuda.get_rng_state())
    if ranks.rank == 0 and not path.exists():
        with atomic_directory(path) as work:
            lora.save_adapter(model, work / "adapter")
            torch.save({"optimizer": optimizer.state_dict(), "rng": rng, **tensors}, work / "state.pt")
            write_json(work / "state.json", numbers)
    ranks.barrier()


def load_latest(directory: Path, model, optimizer, ranks: Ranks, load_state: Callable[[dict, dict], None]) -> None:
    """Put adapter, optimizer and this rank's random state back from the last complete checkpoint, if there is one, and
    give the tensors and numbers of `save` to `load_state`. InputError if the checkpoint is damaged."""
    path = latest(directory)
    if path is None:
        return
    try:
        lora.load_adapter(model, path / "adapter")
        tensors = torch.load(path / "state.pt", weights_only=True, map_location="cpu")
        optimizer.load_state_dict(tensors["optimizer"])
        torch.set_rng_state(tensors["rng"]["cpu"][ranks.rank].clone())  # torch crashes on a view into a larger tensor
        if "cuda" in tensors["rng"]:
            torch.cuda.set_rng_state(tensors["rng"]["cuda"][ranks.rank].clone())
        load_state(tensors, json.loads((path / "state.json").read_text()))
    except Exception as error:  # torch and safetensors raise a dozen types for a damaged file
        raise InputError(f"{path}: damaged checkpoint ({type(error).__name__}: {error}): remove this directory to "
                         "resume from the checkpoint before it") from None


def latest(directory: Path) -> Path | None:
    """The last complete checkpoint in `directory`, None if there is none."""
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return max(found, key=lambda path: int(path.name.removeprefix("step-")), default=None)
