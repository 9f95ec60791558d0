r"""Are two answers equal? A prediction is compared with a gold answer, both TeX or plain text.

    >>> is_equal(r"\dfrac34", "0.75"), is_equal("0.333", r"\frac13")
    (True, False)

How: normalise the TeX, cut it into tokens, read them into a small value, compare two values. A
constant is computed while it is read: in fractions, in 50 digits after a root, pi, e or a
logarithm, in complex floats after i or a sine. Formulas with variables are computed at sample
points, fixed pseudo-random numbers, and are equal when they agree at the first five of 60 where
both are real: sqrt(ab) = sqrt(a)sqrt(b), but sqrt(x^2) is |x|, not x. What is real at fewer than
three, cannot be read or costs too much equals only the same text; 1/0 equals nothing.

Policies, where usage differs:
- Exact: 0.333 is not 1/3. Unreduced is fine: 2/4 = 1/2. 3\frac12 is mixed, 2^10 is 2^{10}, 1/2x is (1/2)x.
- A chain is its first value: x = 1/2 = 0.5 and 1/2 \approx 0.5 are 1/2; but 2+3 = 5 is an equation, and not 5.
- Ignored: currency, % and degrees (50% = 50, not 0.5; sin 30° = 1/2), words after a number (5 cm = 5; outside \text
  only known units: 5 mL is a product) unless they change it (5 west, 5 loss) or the other number has different ones.
- 1,234 is a number, "1, 234" and (1,234) are two; 1,234 is a list if the other side is a list or tuple.
- Bare lists and sets are unordered and alike, tuples are ordered: 1,2 = (1,2), but not (2,1). No extra elements; a
  comma may end a list. (0,1) is a pair or an interval; an inequality is no interval; a column vector is no tuple.
  6:8 is neither 3:4 (it may be a time) nor 6/8. {x | x > 0} is x > 0; an array is a matrix.
- x = 5, f(x) = 5 and "The answer is 5" equal 5, but x = 5 is not y = 5, nor f(x) = 5 g(x) = 5. 10 million is 10^7.
  Equations and inequalities may be rescaled: 2x+2y = 6 is x+y-3 = 0.
- f(...) is a function. So is any letter before brackets with one simple term, as g(0) or P(2x); x(x+1), n(2^n), a(r/2),
  a(1/2)^n, a(1.5) and 2(3) are products. n over k is compared where n >= k.
- 52_8 = 52: the digits are enough, on either side, without the base; the decimal value 42 is not equal.
- \log has base 10, \ln base e; odd roots of negative numbers are real; words ignore case, variables do not.
- Choices: E, (E), E., "Option E", "E) 12" and "(E) 12" name choice E, and are equal unless both have texts and these
  differ; 12 alone does not name it. The gold has a capital; it is also met by the small letter, a to j: e names E, but
  E not the number e. No choices: E + 1, (E)(x), E = 3, E:F, "A or B", "A) 1 or B) 2".
- Unicode is read as TeX: x₁² is x_1^2, 2½ is 2\frac12; full-width and bold forms are plain, every dash is a minus,
  invisible characters are nothing. Digits of other scripts and in circles stay text. \varphi is \phi; so for epsilon,
  theta, kappa, rho, sigma.

All work is bounded by the limits below: no eval, no time-outs, no exceptions. Copy this file: it
needs only Python.
"""

import cmath
import functools
import itertools
import math
import random
import re
import unicodedata
from decimal import Context, Decimal, InvalidOperation, Overflow, Underflow, localcontext
from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 20_000  # longer answers are refused
_INTEGER = re.compile(r"-?[0-9]{1,15}")  # the plain case, before anything is read
MAX_READ_CHARS = 250  # longer answers are compared as text
MAX_DEPTH = 25  # nested brackets, arguments and exponents
MAX_BITS = 24_000  # of a fraction, numerator and denominator together; 1/2006! has 19,1xx
MAX_WORK = 1_000  # for one comparison, in additions of small fractions (about 5 microseconds each)
# sample points to try; where both sides are numbers: to compare; to need
POINTS, ENOUGH, FEWEST = 60, 5, 3


class _Unreadable(Exception):
    """Not mathematics we know, or too much of it: such answers are compared as text."""


_REFUSED = (_Unreadable, ArithmeticError, ValueError, LookupError, RecursionError)
_NOTHING = {"", "nan", "{}", "()", "[]"}
# no number: as 1/0; not real, or too large, at a sample point
_UNDEFINED, _UNKNOWN = "undefined", "unknown"


class _Value(NamedTuple):
    """An answer, or a part of one.

    kind         parts                                         form
    number       a constant, or a function of sample points    "", and the words after it
    difference   left side - right side, in the same way       the sign between them, and their words
    word                                                       (compared by its text)
    base                                                       digits_{base} (not in text)
    list, union  elements in any order (a set is a list, too)
    tuple        elements in order                             brackets of a pair, e.g. "(]"; ":" of a ratio
    matrix       entries row by row                            row lengths; whether it is a system
    relation     a difference per sign, in any order           the 5 of x = 5, or None
    label        the left side of f(x) = 5 or x in A, as text  the 5, the A
    """

    kind: str
    text: str
    parts: tuple = ()
    form: object = None


def is_equal(prediction: str, gold: str) -> bool:
    r"""Whether two answers mean the same, under the policies above; never an exception.

    >>> is_equal(r"\frac{1}{\sqrt2}", r"\frac{\sqrt{2}}{2}"), is_equal("(1,2)", "(2,1)")
    (True, False)
    """
    if not all(isinstance(text, str) and len(text) <= MAX_CHARS for text in (prediction, gold)):
        return False
    if _INTEGER.fullmatch(prediction) and _INTEGER.fullmatch(gold):
        return int(prediction) == int(gold)
    prediction, gold = _spell_out(prediction), _spell_out(gold)
    if _same_choice(prediction, gold):
        return True
    reader = _Reader()
    with localcontext(_PRECISION):
        for commas_group in (True, False):
            a, b = (reader.read(text, commas_group) for text in (prediction, gold))
            try:
                if _same(a, b, reader):
                    return True
            except _REFUSED:
                return a.text == b.text and a.text not in _NOTHING
            if {a.kind, b.kind}.isdisjoint(("list", "tuple")):
                break
    return False


def _same(a: _Value, b: _Value, reader: "_Reader") -> bool:
    reader.spend(1)
    kinds = {a.kind, b.kind}
    if "word" in kinds or kinds > {"base"}:
        return a.text == b.text and a.text not in _NOTHING
    if kinds == {"label"}:
        return a.parts == b.parts and _same(a.form, b.form, reader)
    if kinds > {"relation"} or kinds > {"label"}:
        a, b = (v.form if v.kind in ("relation", "label") else v for v in (a, b))
        return None not in (a, b) and _same(a, b, reader)
    if "list" in kinds and not (
        len(kinds) == 2 and "()" in (a.form, b.form) and min(len(a.parts), len(b.parts)) > 1
    ):
        return _same_in_any_order(*(v.parts if v.kind == "list" else (v,) for v in (a, b)), reader)
    if len(kinds) == 1 and a.kind in ("union", "relation"):
        return _same_in_any_order(a.parts, b.parts, reader)
    if kinds in ({"number"}, {"difference"}):
        return (
            a.form[0] == b.form[0]
            and _same_words(a.form[1:], b.form[1:])
            and _same_formula(a, b, reader)
        )
    if a.form != b.form and "list" not in kinds or len(kinds - {"list", "tuple"}) > 1:
        return False
    return len(a.parts) == len(b.parts) and all(
        _same(x, y, reader) for x, y in zip(a.parts, b.parts, strict=True)
    )


def _same_in_any_order(xs: tuple, ys: tuple, reader: "_Reader") -> bool:
    """Whether every x has a y of its own. The first that fits may be the wrong one, as in 52, 52_8
    and 52_8, 52_9."""
    if len(xs) != len(ys) or not xs:
        return len(xs) == len(ys)
    return any(
        _same(xs[0], y, reader) and _same_in_any_order(xs[1:], ys[:k] + ys[k + 1 :], reader)
        for k, y in enumerate(ys)
    )


def _same_words(xs: tuple, ys: tuple) -> bool:
    """5 min = 5 minutes = 5 = 5 cm, but not 5 boys = 5 girls; a word that changes the number cannot
    be left out."""
    few, many = sorted((xs, ys), key=len)
    rest = [y for y in many if not any(_alike(x, y) for x in few)]
    return all(any(_alike(x, y) for y in many) for x in few) and not any(map(_CHANGING.match, rest))


def _alike(x: str, y: str) -> bool:
    """Whether the words are the same, or one abbreviates the other, as ft does feet: its letters in
    this order."""
    short, long = sorted((x, y), key=len)
    letters = iter(long)
    is_short = short[0] == long[0] and len(long) > 3 and all(letter in letters for letter in short)
    return x == y or is_short and not _CHANGING.match(long)


def _same_formula(a: _Value, b: _Value, reader: "_Reader") -> bool:
    """Whether they agree where both are numbers, differences up to a factor: 2x - 2y = 0 is x - y =
    0. With too few such points the texts decide, unless there is no value at all, as for 1/0."""
    is_constant, factor, found = not any(map(callable, a.parts + b.parts)), None, 0
    for k in range(1 if is_constant else POINTS):
        reader.spend(1)
        x, y = (_at(k, *v.parts) for v in (a, b))
        if isinstance(x, str) or isinstance(y, str) or a.kind == "difference" and x == y == 0:
            continue
        if a.kind == "difference":
            x = 0 if 0 in (x, y) else reader.compute_at(_divide, (x, y), False)
            y = factor = x if factor is None else factor
            if x == 0 or a.form[0] in ("<", "\\le") and x.real < 0:
                return False
        if not _close(x, y):
            return False
        found += 1
        if is_constant or found == ENOUGH:
            return True
    return (
        found >= FEWEST
        or a.text == b.text
        and any(_at(k, *a.parts) != _UNDEFINED for k in range(POINTS))
    )


def _at(k: int, formula):  # its value at sample point k
    return formula(k) if callable(formula) else formula


# Choices

_FONT = re.compile(r"\\(?:text|math)[a-z]*\s*\{([^{}]*)\}")
_CHOICE = re.compile(
    r"(?i:(?:the|my|final|correct|right|best|answer|option|choice|letter|is)\b[ :]*)*"
    # the letter alone, or a bracket, a period or a colon after it, and then no operator
    r"[(\[]?([A-Za-j])(?:[)\]][.:]?|[.:](?= |$)|$)(?: |(?=[0-9\\])|$)"
    r"(?![+*/^=<>,;&|_!']|- |\\(?:c[au]p|cdot|times|div|in|to|pm|[lgn]e|[lg]t|sub|set|circ)|(?:and|or)\b)"
    # and no second choice
    r"(?![A-Z]$|.*(?:(?<!\S)(?:\(?[A-Za-z]\)|[A-Z][.:](?!\S))|\bor \(?[A-Z]\b))(.*)"
)


def choice(text: str) -> tuple[str, str]:
    r"""Letter and text of a choice; no letter if it is none.

    >>> choice(r"\textbf{(E)}\ 12"), choice("Option E"), choice("E + 1")
    (('E', '12'), ('E', ''), ('', ''))
    """
    text = _COSMETIC.sub(" ", _FONT.sub(r" \1 ", text))
    found = _CHOICE.fullmatch(" ".join(text.split()))
    return found.groups() if found else ("", "")


def _same_choice(prediction: str, gold: str) -> bool:
    wanted, rest = choice(gold)
    if not wanted.isupper():  # a is a variable, and (a)5 is 5a
        return False
    letter, words = choice(prediction)
    is_same = wanted in (letter, letter.upper())
    return is_same and (not (words and rest) or is_equal(words, rest))


# Numbers: Fraction (exact), Decimal (50 digits, real) or complex (floats)

_PRECISION = Context(prec=50, Emin=-9999, Emax=9999, traps=[Overflow, Underflow, InvalidOperation])
_TOLERANCE = {Fraction: 0, Decimal: Decimal("1e-45"), complex: 1e-12}  # relative
_PI = Decimal("3.1415926535897932384626433832795028841971693993751058209749445923")
_E = Decimal("2.7182818284590452353602874713526624977572470936999595749670")


@functools.lru_cache(maxsize=1024)  # half a millisecond for the largest fractions
def _to_decimal(x) -> Decimal:
    return x if isinstance(x, Decimal) else Decimal(x.numerator) / Decimal(x.denominator)


def _to_complex(x) -> complex:
    z = complex(x)
    if not abs(z) < 1e12 or (z == 0 and x != 0):
        raise _Unreadable("beyond the digits of floats")
    return z


def _lift(x, y) -> tuple:
    """Both numbers in the less exact of their two types."""
    kinds = {type(x), type(y)}
    convert = _to_complex if complex in kinds else _to_decimal
    return (x, y) if len(kinds) == 1 else (convert(x), convert(y))


def _close(x, y) -> bool:
    x, y = _lift(x, y)
    return x == y or abs(x - y) <= _TOLERANCE[type(x)] * max(abs(x), abs(y))


def _add(x, y):
    x, y = _lift(x, y)
    # What is left of sqrt(8) - 2 sqrt(2) is rounding error, and means 0.
    return Fraction(0) if type(x) is not Fraction and _close(x, -y) else x + y


def _multiply(x, y):
    x, y = _lift(x, y)
    return x * y


def _divide(x, y):
    if y == 0:
        raise ZeroDivisionError
    x, y = _lift(x, y)
    return x / y


def _power(x, y):
    """x ** y: exact for integer y, real for real x > 0 and for odd roots, else the principal
    value."""
    if x == 0 and (isinstance(y, complex) or y <= 0):
        raise ZeroDivisionError
    if isinstance(y, Fraction) and y.denominator == 1:
        _check_bits(abs(y) * sum(_bits(x)))
        return x ** int(y)
    if isinstance(x, complex) or isinstance(y, complex):
        return cmath.exp(_to_complex(y) * cmath.log(_to_complex(x)))
    if x == _E:
        return _to_decimal(y).exp()
    if x >= 0:
        return (
            _to_decimal(x).sqrt()
            if y == Fraction(1, 2)
            else (_to_decimal(y) * _to_decimal(x).ln()).exp()
        )
    if isinstance(y, Fraction) and y.denominator % 2:
        return -_power(-x, y) if y.numerator % 2 else _power(-x, y)
    return _power(_to_complex(x), y)


_OPERATORS = {"+": _add, "-": lambda x, y: _add(x, -y), "*": _multiply, "/": _divide, "^": _power}


def _logarithm(x):
    return cmath.log(_to_complex(x)) if isinstance(x, complex) or x <= 0 else _to_decimal(x).ln()


_QUOTIENTS = {
    "tan": ("sin", "cos"),
    "cot": ("cos", "sin"),
    "sec": ("", "cos"),
    "csc": ("", "sin"),
    "tanh": ("sinh", "cosh"),
    "coth": ("cosh", "sinh"),
    "sech": ("", "cosh"),
    "csch": ("", "sinh"),
}
_SINES = {
    "sin",
    "cos",
    *_QUOTIENTS,
    "sinh",
    "cosh",
    "arcsin",
    "arccos",
    "arctan",
    "arcsinh",
    "arccosh",
    "arctanh",
}


def _sine(name: str, x):
    """One of the _SINES."""
    if name in _QUOTIENTS:
        top, bottom = _QUOTIENTS[name]
        return _divide(_sine(top, x) if top else Fraction(1), _sine(bottom, x))
    z = _to_complex(x)
    if abs(z) > 1e4:
        raise _Unreadable("too many turns for floats")
    result = getattr(cmath, name.replace("arc", "a"))(z)
    # The float nearest to pi is no multiple of pi: its sine is 1e-16, and means 0.
    return result if abs(result) > 1e-14 * abs(z) else Fraction(0)


def _floor(x) -> Fraction:
    """The floor of log_2(8) is 3, although its digits may be 2.99..."""
    nearest = Fraction(round(x.real))
    return nearest if _close(x, nearest) else Fraction(math.floor(x.real if x.imag == 0 else x))


_FUNCTIONS = {
    "abs": abs,
    "exp": functools.partial(_power, _E),
    "floor": _floor,
    "ceil": lambda x: -_floor(-x),
    **dict.fromkeys(("ln", "log", "lg"), _logarithm),
    **{x: functools.partial(_sine, x) for x in _SINES},
}


def _natural(x) -> int:
    if not isinstance(x, Fraction) or x.denominator != 1 or x < 0:
        raise ValueError("not a natural number")
    return int(x)


def _factorial(x):
    _check_bits(_natural(x) * int(x).bit_length())
    return Fraction(math.factorial(int(x)))


def _binomial(n, k):
    n, k = _natural(n), _natural(k)
    _check_bits(min(k, abs(n - k)) * n.bit_length())
    return Fraction(math.comb(n, k))


def _bits(x) -> tuple[int, int]:
    return (
        (x.numerator.bit_length(), x.denominator.bit_length())
        if isinstance(x, Fraction)
        else (0, 0)
    )


def _check_bits(bits) -> None:
    if bits > MAX_BITS:
        raise _Unreadable("fraction too large")


@functools.lru_cache(maxsize=4096)
def _sample(name: str, k: int, *argument) -> Fraction:
    """Value k of a variable or of an unknown function. The ranges take turns: (0, 1), {20..120},
    (-6, 0), {1..12} and (1, 4): for sqrt(1 - x^2), sqrt(x - 9), |x|, 2^(2^n), arccos(x - 2), and
    for factorials."""
    draw = random.Random(f"{name} {k} {argument}")  # seeded by a string: the same in every process
    low, high, denominator = ((1, 14, 15), (20, 120, 1), (-89, -1, 15), (1, 12, 1), (16, 59, 15))[
        k % 5
    ]
    return Fraction(draw.randint(low, high), denominator)


# Reading, first half: TeX -> normalised text -> tokens

_SYMBOLS = str.maketrans(
    "−–—―‐‑‒×·⋅∗•∙‧÷∕⁄∶∣。、′º˚∘〜\u00a0\u2002\u2003\u2009\u200a\u202f",
    "-------*******///:|.,'°°°~      ",
    "€£¥￥₹₽₩¢\u00ad\u200b\u200c\u200d\u200e\u200f\u202a\u202c\u2060\u2061\u2062\u2063\u2064\ufe0e\ufe0f\ufeff",
)
_SYMBOLS |= {
    ord(word[0]): word[1:] + " "
    for word in (
        r"α\alpha β\beta γ\gamma δ\delta ε\epsilon ϵ\epsilon ζ\zeta η\eta θ\theta ϑ\theta ι\iota κ\kappa λ\lambda"
        r" μ\mu µ\mu ν\nu ξ\xi π\pi ϖ\varpi ρ\rho ϱ\rho σ\sigma τ\tau υ\upsilon φ\phi ϕ\phi χ\chi ψ\psi ω\omega"
        r" Γ\Gamma Δ\Delta Θ\Theta Λ\Lambda Ξ\Xi Π\Pi Σ\Sigma Υ\Upsilon Φ\Phi Ψ\Psi Ω\Omega ℓ\ell ∞\infty"
        r" ≤\le ≦\le ⩽\le ≥\ge ≧\ge ⩾\ge ≠\ne ≈\approx ±\pm ∓\mp √\sqrt ∛\sqrt[3] ∜\sqrt[4] ∈\in ∪\cup"
        r" ∅\emptyset ⌊\lfloor ⌋\rfloor ⌈\lceil ⌉\rceil ⟨\langle ⟩\rangle ℃°C"
        r" ㎟mm² ㎠cm² ㎡m² ㎢km² ㎣mm³ ㎤cm³ ㎥m³ ㎦km³"
        r" Ⅰ\text{I} Ⅱ\text{II} Ⅲ\text{III} Ⅳ\text{IV} Ⅴ\text{V} Ⅵ\text{VI} Ⅶ\text{VII} Ⅷ\text{VIII} Ⅸ\text{IX}"
    ).split()
}
_RAISED = {"<super>": "^{%s}", "<sub>": "_{%s}", "<fraction>": "^{%s}"}


def _spell_out(text: str) -> str:
    r"""Unicode as TeX and plain text.

    >>> _spell_out("−2½ x₁⁻¹⁰＝𝛼"), _spell_out("³⁄₄")
    ('-2\\frac{1}{2} x_{1}^{-10}=\\alpha ', '\\frac{3}{4}')
    """
    if text.isascii() or len(text) > MAX_READ_CHARS:
        return text
    pieces = []
    for tag, run in itertools.groupby(text.translate(_SYMBOLS), _tag):
        piece = "".join(run)
        if tag not in ("<circle>", "<compat>"):  # ①② is not 12
            piece = unicodedata.normalize("NFKC", piece).translate(_SYMBOLS)
        if tag == "<fraction>":
            piece = piece.replace("/", "}/_{")
        pieces.append(_RAISED.get(tag, "%s") % piece)
    text = "".join(pieces).replace(" _{", "_{")
    return re.sub(r"\^\{([0-9]+)\}/_\{([0-9]+)\}", r"\\frac{\1}{\2}", text)


def _tag(char):
    """How the character is made of others, as <super>; "" for most."""
    return unicodedata.decomposition(char).partition(" ")[0]


_GROUPS, _COMMA_GROUPS = (
    re.compile(
        rf"(?<![0-9.,])[1-9][0-9]{{0,2}}(?:(?:{separator})[0-9]{{3}})+(?![0-9]|,[0-9]{closing})"
    )
    for separator, closing in (
        (r"\{,\}|,\\[!,] ?|\\[,;: ]|~| (?![0-9]+\s*/)", ""),
        (",", r"|[^(\[]*(?:[)\]]|\\\})"),
    )
)
_COSMETIC = re.compile(
    r"(\\\\)|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|q?quad|math(?:bf|it|bb)"
    r"|boldsymbol)(?![A-Za-z])|\\[!,;:> $()]|\\?%|[$~]"
)
_DEGREE = re.compile(
    r"(?:\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])|°)(?: ?[CF]\b)?"
)
_ARRAY = re.compile(r"\\(begin|end) ?\{array\}(?: ?\{[lcr|@ ]*\})?")
_SYSTEM = re.compile(r"\\\{ ?\\begin ?\{matrix\}(.*)\\end ?\{matrix\} ?\.")
_AND = re.compile(
    r",?\s*(?:\\(?:text[a-z]*|mbox) ?\{ ?,? ?(?:and|or) ?\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))"
)
_PREFIX = re.compile(
    r'("?[a-z][a-z ,"\']*\b(?:is|are|equals)\b|"?(?:(?:the|my|final) )*(?:answers?|solutions?|total|so'
    r'|thus|hence|therefore)\b)[:, "]+(?![a-z]{2}|[:, "=]|$)',
    re.IGNORECASE,
)
_TEXT = re.compile(r"\\(?:text[a-z]*|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_VARIANT = re.compile(r"\\var(?=epsilon|theta|kappa|rho|sigma|phi)")
_MIXED = re.compile(
    r"(?<![\w.^/}\\])([0-9]+)(?: +([0-9]+) ?/ ?([0-9]+)"
    r"| ?\\[dtc]?frac\{([0-9]+)\}\{([0-9]+)\})(?![0-9.])"
)
_WORD = r'"[^"]*"(?: ?\^ ?\{?-?[0-9]\}?)?'
_PHRASE = re.compile(rf"{_WORD}(?: ?[/*]? ?{_WORD}| ?/ ?[a-z](?![A-Za-z]))*")
_ROMAN = {"e", "i", *_FUNCTIONS}  # may be in \mathrm and are no words
_WORDS = set(  # shorter than four letters, or often written without a space after a number
    "no No NO yes nan odd one two ten mm cm km kg ft yd mi in lb oz hrs min sec mph kph day men "
    "per usd pts sq gal rad deg cup bag box boy dog egg hat kid pen way cats cups dogs days "
    "hours minutes seconds square cubic ways meters feet inches miles yards cents dollars "
    "degrees percent people points units apples".split()
)


def _normalise(text: str, commas_group: bool) -> str:
    r"""Drop what TeX only prints, join digit groups, put words in double quotes, write 3\frac12 as
    (3+1/2).

    >>> _normalise(r"$11{,}000 \dfrac12\text{ km}/h$.", True), _normalise("2 square cm^2 xy pi", True)
    ('(11000+1/2)" km/h"', '2 "square cm^2" xy \\pi')
    """

    def mark_word(match):
        is_word = re.match("[^0-9]*[A-Za-z]", match[0]) and match[0].strip() not in _ROMAN
        return f'"{match[0]}"' if is_word else match[0] + " " * (match[0].strip() in _ROMAN)

    def mark_letters(match):
        letters = match[0]
        before = match.string[: match.start()]  # four letters in a row are a word, but not in 5abcd
        is_unit = (
            letters == "sec"
            and before.rstrip()[-1:].isdigit()
            and match.string[match.end() :][:1] != "("
        )
        if not is_unit and letters in _FUNCTIONS or letters in ("sqrt", "pi", "infty"):
            return "\\" + letters
        is_word = (letters if len(letters) < 3 else letters.lower()) in _WORDS
        is_word = is_word or len(letters) >= 4 and not before[-1:].isdigit()
        return f'"{letters}"' if is_word and letters.isalpha() else letters

    def add_fraction(match):
        whole, top, bottom = filter(None, match.groups())
        return f"({whole}+{top}/{bottom})" if int(top) < int(bottom) else match[0]

    text = re.sub(
        r"\\(?:math(?:bf|it|bb)|boldsymbol) ?\{([A-Za-z])\}", r" \1 ", text.replace('"', "")
    )
    text = _VARIANT.sub(r"\\", text)
    for pattern in (_GROUPS, _COMMA_GROUPS) if commas_group else (_GROUPS,):
        text = pattern.sub(lambda m: re.sub("[^0-9]", "", m[0]), text)
    text = " ".join(_COSMETIC.sub(lambda m: m[1] or " ", text).split())
    text = _SYSTEM.sub(r"\\begin{cases}\1\\end{cases}", _ARRAY.sub(r"\\\1{matrix}", text))
    text = _AND.sub(",", _DEGREE.sub("°", text))
    text = re.sub(
        r"_ ?([A-Za-z0-9])", r"_{\1}", _TEXT.sub(lambda m: re.sub("[^,]+", mark_word, m[1]), text)
    )
    if prefix := _PREFIX.match(text):  # The answer is 5: a label, as in Answer = 5
        rest = text[prefix.end() :].replace('"', "", prefix[0].count('"') % 2)
        text = '"' + prefix[1].replace('"', "") + '"=' + rest
    text = re.sub(r"\|([^|]+)\|", r"\\abs{\1}", re.sub(r"\\[lr]?vert(?![A-Za-z])", "|", text))
    text = re.sub(r"(frac|binom) ?([0-9])", r"\1{\2}", text)
    text = re.sub(r"(frac|binom)(\{[^{}]*\}) ?([0-9])", r"\1\2{\3}", text)
    text = re.sub(
        r'"[^"]*"|\\[A-Za-z]+|_\{[^{}]*\}|[A-Za-z]+', mark_letters, _MIXED.sub(add_fraction, text)
    )
    text = _PHRASE.sub(lambda m: '"' + m[0].replace('"', "") + '"', text)
    return text[:-1].strip() if text.endswith(".") and not text.endswith("..") else text


_ALIASES = {
    alias: name
    for name, aliases in {
        "\\frac": "\\dfrac \\tfrac \\cfrac",
        "\\binom": "\\dbinom \\tbinom",
        "*": "\\cdot \\times \\ast",
        "/": "\\div",
        "^": "**",
        "\\le": "\\leq \\leqslant <=",
        "\\ge": "\\geq \\geqslant >=",
        "\\ne": "\\neq !=",
        "<": "\\lt",
        ">": "\\gt",
        "\\{": "\\lbrace",
        "\\}": "\\rbrace",
        "(": "\\langle",
        ")": "\\rangle",
        "\\emptyset": "\\varnothing",
    }.items()
    for alias in aliases.split()
}
_VARIABLE = re.compile(
    r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu"
    r"|xi|rho|sigma|tau|upsilon|(?:var)?phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi"
    r"|Omega|ell)(?![A-Za-z]))(?:_\{[A-Za-z0-9,+-]+\})?"
)
_TOKEN = re.compile(
    r"[0-9]+\.[0-9]*\\(?:overline|bar) ?(?:\{[0-9]+\}|[0-9])|(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
    rf"(?:[eE][+-]?[0-9]+)?|\"[^\"]*\"|{_VARIABLE.pattern}|\\[A-Za-z]+|\\.|\*\*|<=|>=|!=|!!|\S",
    re.S,
)


def _plain_text(tokens: list[str]) -> str:
    """One spelling: no quotes, no spaces except between numbers; for words no case and no brackets
    either."""
    text = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", " ".join(tokens).replace('"', ""))
    text = re.sub(r"\^\{([A-Za-z]|[0-9](?=\}(?![0-9])))\}", r"^\1", text)
    word = re.fullmatch(r"\(?([A-Za-z][A-Za-z,'.-]*?)\)?\.?", text)
    return word[1].lower() if word else text


# Reading, second half: tokens -> value

_CLOSING = {"(": ")", "[": "]", "{": "}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_OPEN, _CLOSE = {*_CLOSING, "\\{", "\\begin"}, {*_CLOSING.values(), "\\}", "\\end"}
_MIRRORED = {">": "<", "\\ge": "\\le"}
_RELATIONS = {"=", "<", "\\le", "\\ne", "\\in", "\\approx", *_MIRRORED}
_LABEL = re.compile(
    r"""[A-Za-z]'*(?:\^\{-1\})?\([A-Za-z0-9,]*\)|\([A-Za-z,]+\)|[A-Z]{2,}|[A-Za-z]+(:[A-Za-z]+)+"""
    '|("[^"]*")+'
)
_BASE = re.compile(r"\(?([0-9][0-9A-Z]*|[A-F][0-9A-F]+)\)?_\{([0-9]{1,2})\}")
_NO_UNIT = re.compile(
    r"\b(?:approx[a-z]*|about|around|roughly|nearly|almost|mod|more|less|fewer|greater|than|least"
    r"|most|not|never|when|if|unless|except|too|wrong|incorrect)\b"
)
_SCALES = {
    "ten": 10,
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
}
_CHANGING = re.compile(  # words that begin so tell a direction, a sign or a factor
    r"\b(?:counter|anti|clockwise|north|south|east|west|up|down|above|below|under|over|ahead|behind|forward|backward"
    r"|before|after|ago|earl|late|b\.?c\b|a\.?d\b|b?c\.?e\b|[ap]\.?m\b|the "
    r"left|leftw|right|inw|outw|inside|outside"
    r"|profit|los[ste]|gain|increas|decreas|rise|rising|rose|fall|fell|dropped|deficit|surplus|debt|owe|deposit|withdr"
    r"|short|excess|extra|discount|off\b|positive|negative|minus|plus|hal[fv]|third|quarter|fourth|fifth|sixth|seventh|eighth"
    rf"|ninth|squared|cubed|factorial|double|triple|twice|gross|score)\w*|(?:{'|'.join(_SCALES)})(?:s|ths?)?\b"
)
_SYMBOL_WORDS = {
    "\\infty": "\\infty",
    "+\\infty": "\\infty",
    "-\\infty": "-\\infty",
    "\\emptyset": "\\emptyset",
    "\\{\\}": "\\emptyset",
}
# The last level (see `expression`) at which to look for the operator, and the level of its right
# side
_INFIX = {"+": (0, 1), "-": (0, 1), "*": (1, 3), "/": (1, 3), "^": (3, 3)}
_CONSTANTS = {"\\pi": _PI, "e": _E, "i": 1j}
_COMMANDS = {*_FUNCTIONS, "frac", "sqrt", "binom", "pi"}
_SIMPLE = {"-", "/", "\\frac", "{", "}", "\\pi"}


def _split(tokens: list[str], separators: set) -> tuple[list, list]:
    """Cut at the separators outside brackets: the pieces, and the separators between them."""
    pieces, found, depth = [[]], [], 0
    for token in tokens:
        depth += (token in _OPEN) - (token in _CLOSE)
        if depth == 0 and token in separators:
            found.append(token)
            pieces.append([])
        else:
            pieces[-1].append(token)
    if found[-1:] == [","] and not pieces[-1]:  # a comma may end a list
        pieces.pop()
    return pieces, found


def _is_constant(tokens) -> bool:
    return all(token in _CONSTANTS or not _VARIABLE.match(token) for token in tokens)


class _Reader:
    """Recursive descent. First the shape of the answer (list, tuple, relation, ...), then its
    formulas."""

    def __init__(self):
        self.left, self.known = MAX_WORK, {}  # no operation is done twice, in either answer

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise _Unreadable("too much work")

    def read(self, text: str, commas_group: bool) -> _Value:
        if len(text) > MAX_READ_CHARS:
            return _Value("word", "".join(text.split()))
        tokens = [
            _ALIASES.get(token, token) for token in _TOKEN.findall(_normalise(text, commas_group))
        ]
        text, self.depth = _plain_text(tokens), 0
        try:
            value = self.answer(tokens)
            return value if value.kind in ("word", "base") else value._replace(text=text)
        except _REFUSED:
            return _Value("word", text)

    def deeper(self, parse, *arguments):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unreadable("nested too deeply")
        result = parse(*arguments)
        self.depth -= 1
        return result

    def answer(self, tokens: list[str]) -> _Value:
        items = []
        for piece in _split(tokens, {",", ";"})[0]:
            # 1 \pm 2 is 1 + 2 and 1 - 2; all signs of one element go together. A set doubles its
            # own elements.
            is_double = {"\\pm", "\\mp"} & {*piece} and "\\{" not in piece
            for signs in (
                ({"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"}) if is_double else ({},)
            ):
                items.append([signs.get(token, token) for token in piece])
        if len(items) == 1:
            return self.item(items[0])
        return _Value("list", _plain_text(tokens), tuple(map(self.item, items)))

    def item(self, tokens: list[str]) -> _Value:
        text = _plain_text(tokens)
        self.spend(4)
        sides, signs = _split(tokens, _RELATIONS)
        if signs:
            value = self.relation(sides, signs, text)
            if (
                value.kind == "number"
                and "\\approx" not in signs
                and any({*"+-*"} & {*side[1:]} for side in sides)
            ):
                raise _Unreadable("2+3 = 5 is an equation, and not only its value, as 1/2 = 0.5 is")
            return value
        pieces, separators = _split(tokens, {"\\cup", ":"})
        if separators:
            parts = tuple(map(self.item, pieces))
            if ":" not in separators:
                return _Value("union", text, parts)
            # no 3:00
            if "\\cup" not in separators and not any(
                x.kind != "number" or x.parts == (0,) for x in parts
            ):
                return _Value("tuple", text, parts, ":")
        if tokens[0] == "\\begin":
            return self.matrix(tokens, text)
        if text in _SYMBOL_WORDS or all(token[0] == '"' for token in tokens):
            return _Value("word", _SYMBOL_WORDS.get(text, text))
        if (
            tokens[0] in ("(", "[", "{", "\\{")
            and tokens[-1] in _CLOSE
            and len(_split(tokens, _CLOSE)[0]) == 2
        ):
            return self.deeper(self.bracket, tokens, text)
        if (base := _BASE.fullmatch(text)) and 2 <= int(base[2]) <= 36:
            int(base[1], int(base[2]))  # refuses 99_8
            return _Value(
                "base", base[1].lstrip("0") or "0", form=base[0].lstrip("(0").replace(")", "")
            )
        return _Value("number", text, (self.formula(tokens),), ("", *self.words))

    def bracket(self, tokens: list[str], text: str) -> _Value:
        inner, brackets = tokens[1:-1], tokens[0] + tokens[-1]
        if brackets == "\\{\\}":
            pieces, _ = _split(inner, {"|", ":", "\\mid"})
            if (
                len(pieces) == 2
                and "".join(pieces[0][1:]) in ("", "\\in{R}", "\\inR")
                and pieces[0][0] in pieces[1]
            ):
                return self.answer(pieces[1])
            value = self.answer(inner)
            return value if value.kind == "list" else _Value("list", text, (value,))
        pieces, _ = _split(inner, {",", ";"})
        if brackets == "{}" or len(pieces) == 1 and brackets in ("()", "[]"):
            return self.answer(inner)
        if brackets not in ("()", "[]", "(]", "[)"):
            raise _Unreadable("brackets do not match")
        return _Value(
            "tuple", text, tuple(map(self.item, pieces)), brackets if len(pieces) == 2 else "()"
        )

    def matrix(self, tokens: list[str], text: str) -> _Value:
        r"""\begin { "pmatrix" } a & b \\ c & d \end { "pmatrix" }"""
        is_known = re.fullmatch('"([pbB]?(small)?matrix|cases)"', tokens[2])
        if not is_known or tokens[1:4] != tokens[-3:] or tokens[-4] != "\\end":
            raise _Unreadable("no matrix")
        rows = [_split(row, {"&"})[0] for row in _split(tokens[4:-4], {"\\\\"})[0] if row]
        form = [*map(len, rows), tokens[2] == '"cases"']
        return _Value(
            "matrix", text, tuple(self.item(entry) for row in rows for entry in row), form
        )

    def relation(self, sides: list, signs: list, text: str) -> _Value:
        if "\\approx" in signs:  # what follows is rounded
            signs = signs[: signs.index("\\approx")]
            sides = sides[: len(signs) + 1]
            if not signs and (not _is_constant(sides[0]) or sides[0][0][0] == '"'):
                raise _Unreadable("no exact value")
        name, is_equation = "".join(sides[0]), {*signs} == {"="}
        if (
            is_equation
            and _LABEL.fullmatch(name)
            or signs == ["\\in"]
            and _VARIABLE.fullmatch(name)
        ):
            if name[0] == '"' and (_NO_UNIT.search(name.lower()) or _CHANGING.search(name.lower())):
                raise _Unreadable("more than a label")
            return _Value(
                "label", text, (_plain_text(sides[0]),), self.relation(sides[1:], signs[1:], text)
            )
        if is_equation:
            sides = self.shortened(sides)
            signs = signs[: len(sides) - 1]
        if not signs:
            return self.item(sides[0])
        assigned = None
        for side, value in (sides, sides[::-1]) if signs == ["="] else ():
            if len(side) == 1 and _VARIABLE.match(side[0]) and not assigned:
                assigned = self.item(value)
                if assigned.kind != "number":
                    return _Value("label", text, (side[0],), assigned)
        return _Value(
            "relation", text, tuple(map(self.difference, signs, sides, sides[1:])), assigned
        )

    def shortened(self, sides: list) -> list:
        """x = 1/2 = 0.5 says no more than x = 1/2, and S = ab = 6 than S = 6."""
        kept = sides[:1]
        for side in sides[1:]:
            if (
                not _is_constant(kept[-1] + side)
                or self.formula(["(", *kept[-1], ")", "-", "(", *side, ")"]) != 0
            ):
                kept.append(side)
        is_middle = [_is_constant(side) for side in kept] == [False, False, True] and len(
            kept[0]
        ) == 1 < len(kept[1])
        return kept[::2] if is_middle else kept

    def difference(self, sign: str, left: list, right: list) -> _Value:
        if sign in _MIRRORED:
            sign, left, right = _MIRRORED[sign], right, left
        tokens = ["(", *left, ")", "-", "(", *right, ")"]
        value = self.formula(tokens)
        if not callable(value) and value != _UNDEFINED:
            raise _Unreadable("always true or false")
        return _Value("difference", _plain_text(tokens), (value,), (sign, *self.words))

    # Formulas: a constant is computed while it is read, a formula with variables later, at sample
    # points

    def compute(self, operation, *arguments):
        """The result of an operation; if an argument is a function of the sample point, so is the
        result."""
        key = operation, arguments, tuple(map(type, arguments))
        if key not in self.known:
            at_point = functools.cache(
                lambda k: self.compute_at(operation, [_at(k, x) for x in arguments], True)
            )
            is_constant = not any(map(callable, arguments))
            self.known[key] = (
                self.compute_at(operation, arguments, False) if is_constant else at_point
            )
        return self.known[key]

    def compute_at(self, operation, point, is_sample: bool):
        if missing := [x for x in point if x is _UNDEFINED or x is _UNKNOWN]:
            return missing[0]
        try:
            result = operation(*point)
            top, bottom = _bits(result)
            _check_bits(top + bottom)
            result = _to_complex(result) if isinstance(result, (float, complex)) else result
        # a type is wrong where complex numbers need an order
        except (ZeroDivisionError, ValueError, TypeError):
            return _UNDEFINED
        except (_Unreadable, ArithmeticError):
            if is_sample:
                return _UNKNOWN
            raise
        is_slow = isinstance(result, Decimal) and operation in (_power, _logarithm)
        self.spend(
            12
            if is_slow
            else 1 + (top + bottom >> (6 if operation is _binomial else 8)) + (top * bottom >> 20)
        )
        if isinstance(result, complex):
            if abs(result.imag) <= 1e-12 * abs(result):
                return complex(result.real)
            if is_sample and not any(isinstance(x, complex) and x.imag for x in point):
                return _UNKNOWN
        return _UNKNOWN if is_sample and operation is _binomial and result == 0 else result

    def formula(self, tokens: list[str]):
        self.tokens, self.at, self.in_sine, self.words = [*tokens, ""], 0, 0, []
        result = self.expression(0)
        if self.tokens[self.at]:
            raise _Unreadable("unexpected " + self.tokens[self.at])
        return result

    def takes(self, wanted: str) -> bool:
        """Step over the next token if it is the one wanted."""
        is_next = self.tokens[self.at] == wanted
        self.at += is_next
        return is_next

    def expression(self, level: int):
        """Level 0: sums; 1: products; 2: the argument of a function, as in sin 2x; 3: powers."""
        if self.takes("-"):
            left = self.compute(_multiply, self.deeper(self.expression, 3), Fraction(-1))
        else:
            left = self.deeper(self.expression, 3) if self.takes("+") else self.primary()
        while True:
            token = self.tokens[self.at]
            loosest, right = _INFIX.get(token, (-1, 0))
            if level <= loosest:
                base = self.tokens[self.at - 1]
                self.at += 1
                left = self.compute(_OPERATORS[token], left, self.deeper(self.expression, right))
                if token == "^" and self.is_argument(base):
                    raise _Unreadable("f^{-1}(3) is no product")
            elif self.takes("!"):
                left = self.compute(_factorial, left)
            elif self.takes("°"):
                left = self.compute(_multiply, left, _PI / 180) if self.in_sine else left
            elif level <= 1 and token[:1] == '"':
                left = self.unit(left, re.findall("the left|[a-z][a-z.]*", token.lower()))
            elif (
                level <= 2
                and self.starts_factor(token)
                and not (level == 2 and token[1:] in _FUNCTIONS)
            ):
                left = self.compute(_multiply, left, self.expression(3))
            else:
                return left

    def starts_factor(self, token: str) -> bool:
        is_number = token[:1].isdigit() and self.tokens[self.at - 1] in ("!", ")")
        return (
            is_number
            or token in _CLOSING
            or token[1:] in _COMMANDS
            or _VARIABLE.match(token) is not None
        )

    def unit(self, left, words: list[str]):
        """Step over the words after a number: a unit means nothing here, 10 million is a product, a
        loss is noted."""
        self.at += 1
        phrase = " ".join(words)
        is_unit = not callable(left) or {*words} <= _WORDS
        if not is_unit or _NO_UNIT.search(phrase) or self.starts_factor(self.tokens[self.at]):
            raise _Unreadable("more than a unit")
        while words and words[0].rstrip("s") in _SCALES:
            left = self.compute(_multiply, left, Fraction(_SCALES[words.pop(0).rstrip("s")]))
        any_unit = (
            {"unit", "units", "square", "sq", "cubic"} if {"unit", "units"} & {*words} else set()
        )
        self.words += [word for word in words if word not in any_unit]
        return left

    def is_argument(self, name: str) -> bool:
        """Whether the bracket that follows a letter is no factor: see the policies."""
        bracket = self.tokens[self.at]
        if not _VARIABLE.match(name) or bracket not in ("(", "["):
            return False
        inner = _split(self.tokens[self.at :], {_CLOSING[bracket]})[0][0][1:]
        if name in _CONSTANTS:
            return inner == ["0"]  # i(0) is a current
        is_power = self.tokens[self.at + len(inner) + 2 :][:1] == ["^"]
        # a product: a(1/2)^n, k(m/r)
        is_ratio = {"\\frac", "/"} & {*inner} and (is_power or not _is_constant(inner))
        is_term = all(
            token.isdigit() or token in _SIMPLE or _VARIABLE.match(token) for token in inner
        )
        return (
            name[0] == "f"
            or is_term
            and not is_ratio
            and name not in inner
            and "-" not in inner[1:]
        )

    def primary(self):
        token = self.tokens[self.at]
        self.at += 1
        self.spend(1)
        if token in _CLOSING:
            value = self.deeper(self.expression, 0)
            if not self.takes(_CLOSING[token]):
                raise _Unreadable("bracket not closed")
            return self.compute(_FUNCTIONS[token[2:]], value) if token[2:] in _FUNCTIONS else value
        if token in ("\\frac", "\\binom"):
            operation = _divide if token == "\\frac" else _binomial
            return self.compute(operation, self.deeper(self.primary), self.deeper(self.primary))
        if token == "\\sqrt":
            degree = self.deeper(self.primary) if self.tokens[self.at] == "[" else Fraction(2)
            exponent = self.compute(_divide, Fraction(1), degree)
            return self.compute(_power, self.deeper(self.primary), exponent)
        if token[1:] in _FUNCTIONS:
            return self.deeper(self.function, token[1:])
        argument = [self.deeper(self.primary)] if self.is_argument(token) else []
        if token in _CONSTANTS and not argument:
            return _CONSTANTS[token]
        if not _VARIABLE.match(token):
            number = _number(token)
            self.spend(sum(_bits(number)) >> 8)
            return number
        # int(k) is k, the number of the sample point
        return self.compute(_sample, token, int, *argument)

    def function(self, name: str):
        base = self.primary() if self.takes("_") else Fraction(10)
        exponent = self.primary() if self.takes("^") else Fraction(1)
        if exponent == Fraction(-1) and "arc" + name in _SINES:
            name, exponent = "arc" + name, Fraction(1)
        self.in_sine += name in _SINES
        value = self.primary() if self.tokens[self.at] in _CLOSING else self.expression(2)
        self.in_sine -= name in _SINES
        value = self.compute(_FUNCTIONS[name], value)
        if name in ("log", "lg"):
            value = self.compute(_divide, value, self.compute(_logarithm, base))
        return self.compute(_power, value, exponent)


def _number(token: str) -> Fraction:
    r"""
    >>> _number("1.2e3"), _number(r"0.1\overline{6}")
    (Fraction(1200, 1), Fraction(1, 6))
    """
    if not re.match(r"\.?[0-9]", token):
        raise _Unreadable("unexpected " + token)
    if "\\" in token:
        fixed, _, period = re.sub(r"[^0-9.\\]", "", token).partition("\\")
        nines = 10 ** len(period) - 1
        return Fraction(fixed) + Fraction(
            int(period), nines * 10 ** (len(fixed) - fixed.index(".") - 1)
        )
    _check_bits(abs(int(token.lower().partition("e")[2] or 0)) * 4)
    return Fraction(token)
