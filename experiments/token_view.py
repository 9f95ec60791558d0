"""A page that shows completions token by token: what the teacher is unsure of, what the gate does,
who gets the credit.

    python -m experiments.diagnostics --model toy --adapter runs/train/checkpoints/step-000064/adapter --data toy \\
                                      --max-new-tokens 128 --out runs/look-trained
    python -m experiments.token_view runs/look-trained/tokens.jsonl --out results/token_view.html

One HTML file without anything from elsewhere; it opens from disk in any browser, readable in light
and dark. Colours show teacher entropy, gate or token advantage, one at a time; pivots are
underlined with dots, forks with a double line, locks not; pointing at a token, or stepping to it
with the tab key, shows all its values.
"""

import json

from support.errors import DAMAGED, InputError, reason
from support.flags import Parser, nonempty_path
from support.report import COLOURS, article, document, escaped, navigation
from support.run import one_line_errors, say

PROGRAM = "python -m experiments.token_view"


def page(rows: list[dict], title: str, colour: str = "entropy") -> str:
    """The whole page of lines of tokens.jsonl."""
    articles = "".join(
        article(
            i,
            row,
            f"""<details><summary>student's prompt and reference solution</summary>
<pre>{escaped(row["prompt"])}</pre>
<pre>{escaped(row["solution"])}</pre></details>""",
        )
        for i, row in enumerate(rows)
    )
    return document(
        title,
        f"""<p class="faint">{len(rows)} sampled solutions, each read by the teacher, who also sees
the reference. A token's advantage is A x magnitude x gate. Point at a token for its values.</p>
{navigation(rows, colour)}
{articles}""",
        rows,
    )


def main() -> None:
    parser = Parser(__doc__, prog=PROGRAM)
    add = parser.add_argument
    add("tokens", type=nonempty_path, help="tokens.jsonl of a run of experiments.diagnostics")
    add(
        "--out",
        type=nonempty_path,
        default=None,
        help="the page (default: token_view.html beside the input)",
    )
    add(
        "--count",
        type=int,
        default=24,
        help="completions shown, from the first (default: %(default)s)",
    )
    add(
        "--title",
        default="EGRSD, token by token",
        help="heading of the page (default: %(default)s)",
    )
    add("--colour", choices=COLOURS, default="entropy", help="at first (default: %(default)s)")
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        a = parser.parse_args()
        try:
            rows = [
                json.loads(line) for line in a.tokens.read_text().splitlines()[: max(0, a.count)]
            ]
            text = page(rows, a.title, a.colour)
            out = a.out or a.tokens.with_name("token_view.html")
            if not rows or out.resolve() == a.tokens.resolve():
                raise ValueError("no lines, --count is below 1, or --out is the same file")
        except (OSError, *DAMAGED) as error:
            raise InputError(
                f"{a.tokens}: not a tokens.jsonl ({reason(error)}): make one with "
                "python -m experiments.diagnostics --out"
            ) from None
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        say(str(out))


if __name__ == "__main__":
    main()
