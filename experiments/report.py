"""Pages for the browser: training runs, also while they go on, or completions token by token.

    python -m experiments.report runs/train                  writes runs/train/report.html
    python -m experiments.report runs/seed0 runs/seed1 --out seeds.html
                                                             curves over each other, settings that differ
    python -m experiments.report runs/look/tokens.jsonl      a file of experiments.diagnostics: writes
                                                             runs/look/token_view.html

A page is one file and needs no other. On a page of completions, colours show teacher entropy, gate
or token advantage, one at a time. Pivots are underlined with dots, forks with a double line, locks
not at all. Point at a token, or step to it with the tab key, to see all its values.
"""

from pathlib import Path

from support.checkpoint import write_text
from support.errors import InputError
from support.flags import Parser, nonempty_path
from support.report import parsed, token_view, write
from support.run import one_line_errors

PROGRAM = "python -m experiments.report"


def tokens_page(path: Path, count: int) -> str:
    """The page of the first `count` completions of a tokens.jsonl; InputError if it is none."""
    lines = path.read_text().splitlines()
    completions = [parsed(line, f"{path}: not a tokens.jsonl") for line in lines[:count]]
    if count < 1 or not completions or "tokens" not in completions[0]:
        raise InputError(f"{path}: not a tokens.jsonl, no lines, or --count is below 1")
    return token_view(completions)


def main() -> None:
    parser = Parser(__doc__, prog=PROGRAM)
    add = parser.add_argument
    add("source", type=nonempty_path, nargs="+", help="directories of runs, or a tokens.jsonl")
    add("--out", type=nonempty_path, default=None, help="the page (default: see above)")
    add("--count", type=int, default=24, help="of tokens.jsonl, from the first (default: 24)")
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        a = parser.parse_args()
        first = a.source[0]
        of_tokens = first.suffix == ".jsonl"
        if of_tokens:
            default = first.parent / "token_view.html"
        elif len(a.source) == 1:
            default = first / "report.html"
        else:
            default = Path("report.html")
        out = a.out or default
        if out.suffix != ".html":
            raise InputError(f"{out}: a page is needed here, such as report.html")
        if of_tokens:
            page = tokens_page(first, a.count)
            out.parent.mkdir(parents=True, exist_ok=True)
            write_text(out, page)
        else:
            write(a.source, out)
        print(out, flush=True)


if __name__ == "__main__":
    main()
