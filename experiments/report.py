"""A page of a training run as train.py leaves it, also while it goes on, or of several runs over
each other.

python -m experiments.report runs/train                              # writes runs/train/report.html
python -m experiments.report runs/seed0 runs/seed1 --out seeds.html  # curves over each other, settings that differ
"""

from pathlib import Path

from support.errors import InputError
from support.flags import Parser, nonempty_path
from support.report import write
from support.run import one_line_errors, say

PROGRAM = "python -m experiments.report"


def main() -> None:
    parser = Parser(__doc__, prog=PROGRAM)
    parser.add_argument(
        "runs", type=nonempty_path, nargs="+", metavar="DIR", help="directory of a run"
    )
    parser.add_argument(
        "--out",
        type=nonempty_path,
        default=None,
        help="the page (default: report.html in DIR; of several runs, in the working directory)",
    )
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        a = parser.parse_args()
        out = a.out or (a.runs[0] if len(a.runs) == 1 else Path()) / "report.html"
        if out.suffix != ".html":
            raise InputError(f"{out}: a page is needed here, such as report.html")
        write(a.runs, out)
        say(str(out))


if __name__ == "__main__":
    main()
