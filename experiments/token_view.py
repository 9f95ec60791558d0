"""A page that shows completions token by token: what the teacher is unsure of, what the gate does, who gets the credit.

    python -m experiments.diagnostics --model toy --adapter runs/train/checkpoints/step-000064/adapter --data toy \\
                                      --max-new-tokens 128 --out runs/look
    python -m experiments.token_view runs/look/tokens.jsonl --out results/token_view.html

One HTML file without anything from elsewhere; it opens from disk in any browser, readable in light and dark. Colours
show teacher entropy, gate or token advantage, one at a time; pivots are underlined with dots, forks with a double line,
locks not; pointing at a token, or stepping to it with the tab key, shows all its values.
"""

import html
import json
import re
from pathlib import Path

from support.errors import DAMAGED, InputError, reason
from support.flags import Parser, nonempty_path
from support.run import one_line_errors, say

PROGRAM = "python -m experiments.token_view"
KINDS = ("lock", "pivot", "fork")
COLUMNS = ("entropy", "lookahead", "gate", "delta", "advantage", "kind")

# Control characters but tab and line feed, invisible ones, those that turn the direction of text, halves of characters
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
TEMPLATE = Path(__file__).with_suffix(".html")  # with {{name}} where `page` puts something in


def page(rows: list[dict], title: str, colour: str = "entropy") -> str:
    """The whole page of lines of tokens.jsonl; every text is escaped, so that a completion cannot end the page."""
    radios = ""
    for value, text in (("entropy", "teacher entropy"), ("gate", "gate"), ("advantage", "token advantage")):
        checked = " checked" if value == colour else ""
        radios += f'<label><input type="radio" name="colour" value="{value}"{checked}> {text}</label>'
    data = json.dumps([{"tokens": [*map(visible, row["tokens"])]} | {name: row[name] for name in COLUMNS}
                       for row in rows], separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # inside a script element only "</" and "<!--" could end the data
    parts = {"title": escaped(title), "count": str(len(rows)), "radios": radios, "data": data,
             "articles": "".join(article(i, row) for i, row in enumerate(rows))}
    # In one pass over the template, so that braces in a completion are not taken for a name.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], TEMPLATE.read_text(encoding="utf-8"))


def visible(text: str) -> str:
    """Characters that would garble the page, or break it, become their code, such as [U+202E]."""
    return HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)


def escaped(text: str) -> str:
    return html.escape(visible(text))


def article(i: int, row: dict) -> str:
    """One completion, its line breaks made visible."""
    shown = [escaped(token).replace("\n", "\u21b5\n") for token in row["tokens"]]
    tokens = "".join(f'<span class="t {KINDS[kind]}" data-i="{i}" data-t="{t}" tabindex="0">{text}</span>'
                     for t, (text, kind) in enumerate(zip(shown, row["kind"], strict=True)))
    verdict = "correct" if row["correct"] else "wrong"
    return f"""<article><h2>{escaped(row["problem"])}</h2>
<div class="faint">{verdict}, gold answer {escaped(row["answer"])}, reward {row["reward"]:.3f}, A = {row["A"]:+.3f},
{len(row["tokens"])} tokens</div><div class="completion">{tokens}</div>
<details><summary>student's prompt and reference solution</summary><pre>{escaped(row["prompt"])}</pre>
<pre>{escaped(row["solution"])}</pre></details></article>
"""


def main() -> None:
    parser = Parser(__doc__, prog=PROGRAM)
    add = parser.add_argument
    add("tokens", type=nonempty_path, help="tokens.jsonl of a run of experiments.diagnostics")
    add("--out", type=nonempty_path, default=None, help="the page (default: token_view.html beside the input)")
    add("--count", type=int, default=24, help="completions shown, from the first (default: %(default)s)")
    add("--title", default="EGRSD, token by token", help="heading of the page (default: %(default)s)")
    add("--colour", choices=("entropy", "gate", "advantage"), default="entropy", help="at first (default: %(default)s)")
    with one_line_errors(PROGRAM, "stopped, nothing was written"):
        a = parser.parse_args()
        try:
            rows = [json.loads(line) for line in a.tokens.read_text().splitlines()[:max(0, a.count)]]
            text = page(rows, a.title, a.colour)
            out = a.out or a.tokens.with_name("token_view.html")
            if not rows or out.resolve() == a.tokens.resolve():
                raise ValueError("no lines, --count is below 1, or --out is the same file")
        except (OSError, *DAMAGED) as error:
            raise InputError(f"{a.tokens}: not a tokens.jsonl ({reason(error)}): make one with "
                             "python -m experiments.diagnostics --out") from None
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
        say(str(out))


if __name__ == "__main__":
    main()
