"""EGRSD's neighbours: other methods on the same rollouts and the same teacher pass, and ablations
of EGRSD.

    python -m family --method opsd                                          the toy on a laptop CPU
    torchrun --standalone --nproc-per-node=8 -m family --method opsd --model Qwen/Qwen3-4B --data openthoughts.jsonl
    python -m family --method opsd --explain                                what it is, brings and costs
    python -m family --method egrsd --teacher-context answer                EGRSD with another teacher

The training step and all other flags are those of train.py. docs/family.md has a table of the
methods.
"""

import sys

import train
from family.explain import explain
from family.neighbour import Neighbour
from family.settings import FamilySettings
from support import run, settings


def parse_arguments(argv: list[str]) -> tuple[FamilySettings, bool, Neighbour]:
    """(settings, resume?, method) from the command line."""
    parser = settings.make_parser(__doc__, FamilySettings)
    parser.add_argument(
        "--explain", action="store_true", help="print what --method is, brings and costs, and end"
    )
    given = vars(parser.parse_args(argv))
    explains = given.pop("explain", False)
    s, resume = settings.resolve(given, FamilySettings)
    s.check()
    if explains:
        explain(s)
        raise SystemExit(0)
    return s, resume, Neighbour(s)


def main() -> None:
    with run.one_line_errors(
        "python -m family", "interrupted before training began, nothing was written"
    ):
        train.train(*parse_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
