"""Pages for the browser: of training runs, also while they go on, or of completions token by token.

    python -m experiments.report runs/train                  writes runs/train/report.html
    python -m experiments.report runs/seed0 runs/seed1 --out seeds.html
                                                             curves over each other, settings that differ
    python -m experiments.report runs/look/tokens.jsonl      of experiments.diagnostics: writes
                                                             runs/look/token_view.html

A page is one file without anything from elsewhere. In the last one colours show teacher entropy,
gate or token advantage, one at a time; pivots are underlined with dots, forks with a double line,
locks not; pointing at a token, or stepping to it with the tab key, shows all its values.
"""

import json
from pathlib import Path

from support.checkpoint import write_text
from support.errors import DAMAGED, InputError, reason
from support.flags import Parser, nonempty_path
from support.report import COLOURS, token_view, write
from support.run import one_line_errors, say

PROGRAM = "python -m experiments.report"


def tokens_page(path: Path, count: int, title: str, colour: str) -> str:
    """The page of a tokens.jsonl; InputError if it is none."""
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()[: max(0, count)]]
        if not rows:
            raise ValueError("no lines, or --count is below 1")
        return token_view(rows, title, colour)
    except (OSError, *DAMAGED) as error:
        raise InputError(
            f"{path}: not a tokens.jsonl ({reason(error)}): make one with "
            "python -m experiments.diagnostics --out"
        ) from None


def main() -> None:
    parser = Parser(__doc__, prog=PROGRAM)
    add = parser.add_argument
    add("source", type=nonempty_path, nargs="+", help="directories of runs, or a tokens.jsonl")
    add("--out", type=nonempty_path, default=None, help="the page (default: see above)")
    add("--count", type=int, default=24, help="of tokens.jsonl, from the first (default: 24)")
    add("--title", default="EGRSD, token by token", help="of that page (default: %(default)s)")
    add("--colour", choices=COLOURS, default="entropy", help="at first (default: %(default)s)")
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        a = parser.parse_args()
        first, of_tokens = a.source[0], a.source[0].suffix == ".jsonl"
        name = "token_view.html" if of_tokens else "report.html"
        out = (
            a.out or (first.parent if of_tokens else first if len(a.source) == 1 else Path()) / name
        )
        if out.suffix != ".html":
            raise InputError(f"{out}: a page is needed here, such as report.html")
        if of_tokens:
            text = tokens_page(first, a.count, a.title, a.colour)
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, text)
        else:
            write(a.source, out)
        say(str(out))


if __name__ == "__main__":
    main()
