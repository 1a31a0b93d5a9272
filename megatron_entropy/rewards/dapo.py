r"""The grader of DAPO: the last `Answer:` line, normalised, must equal the normalised ground truth.

Source: DAPO (arXiv 2503.14476) and its release's `math_dapo.py`, whose normalisation comes from the appendix on MATH of
Minerva (arXiv 2206.14858). Its quirks are kept, since published numbers depend on them: the words below are removed
wherever they occur, "a " also at the end of a longer word, and only the text after the last `=` counts. So `42.`,
`**42**` and `**Answer:** 42` are not `42`, `033` is not `33`, 300 blanks after the answer hide it, and a `\boxed{}`
without `Answer:` does not count (verl 0.9.1 accepts it).
"""

from __future__ import annotations

import re

from megatron_entropy.records import Grade

TAIL = 300  # only the last characters of a response are read
TRUTH_LENGTH = 10_000  # characters; normalising a longer ground truth may take quadratic time
INVALID = "[INVALID]"
ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

REPLACED = (
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    (r"\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (r",\text{and}", ","),
    (r"\text{and}", ","),
    (r"\text{m}", r"\text{}"),
)
UNITS = (
    "square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents degrees "
    "cm gm pounds meters meals edges students childrentickets multiples"
).split()
REMOVED = (
    *UNITS,
    *(r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3", "\\text{\n}", r"\text{}"),
    *(r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)
UNWRAPPED = tuple(re.compile(rf"\\{command}\{{(.*?)\}}") for command in ("text", "textbf", "overline"))
UNBOXED = re.compile(r"\\boxed\{(.*)\}")


def dapo(response: str, answer: str) -> Grade:
    r"""Grade the last `Answer: ...` within the last 300 characters of a response.

    `\boxed{}` and `$...$` around the answer are removed. `extracted` is the normalised answer, or `[INVALID]`.
    The response of a branched sample is its generated text only, so an `Answer:` in its response prefix does not count.
    """
    if len(answer) > TRUTH_LENGTH:
        return Grade(None, error=f"the ground truth has {len(answer)} characters, more than {TRUTH_LENGTH}")
    found = ANSWER.findall(response[-TAIL:])
    extracted = normalise(found[-1] if found else INVALID)
    return Grade(extracted == normalise(answer), extracted)


def normalise(text: str) -> str:
    """Return a final answer in canonical form: no units, LaTeX wrapping, spaces or thousands commas."""
    text = text.split("=")[-1]
    for old, new in REPLACED:
        text = text.replace(old, new)
    for word in REMOVED:
        text = text.replace(word, "")
    text = "\n".join(_first_formula(line) for line in text.split("\n"))
    for pattern in (*UNWRAPPED, UNBOXED):
        text = pattern.sub(r"\1", text)
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)  # \frac12 is \frac{1}{2}
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text)
    text = text.replace("$", "")
    digits = text.replace(",", "")
    return (digits if digits.isdigit() else text).strip()


def _first_formula(line: str) -> str:
    """Reduce a line with a `$...$` to that formula."""
    parts = line.split("$", 2)
    return f"${parts[1]}$" if len(parts) == 3 else line
