"""WikiText as one would write it: its rows keep spaces around punctuation, and marks such as ` @-@ ` inside words."""

import re

HEADING = re.compile(r"^ ?((?:= )+)(.*?)((?: =)+) ?$")
SPACES = (
    (re.compile(r" @([-,.])@ "), r"\1"),  # inside words and numbers: "well @-@ known", "1 @,@ 000"
    (re.compile(r" ([,.;:!?%)\]}])(?=\s|$|\")"), r"\1"),
    (re.compile(r"([(\[{$£€]) "), r"\1"),
    (re.compile(r"(\w) '(s|t|re|ve|ll|d|m)\b"), r"\1'\2"),  # "city 's", "didn 't"
    (re.compile(r"(\w)s ' "), r"\1s' "),  # "musicians ' "
)
QUOTED = re.compile(r'" (.*?) "')  # within a line, quotation marks come in pairs


def detokenize(row: str) -> str:
    """One row of WikiText without the spaces of its tokenizer.

    Headings keep their level: ` = = History = = ` becomes `== History ==`. Single quotes within a text stay apart,
    since they may begin or end a quotation.
    """
    line = row.rstrip("\n")
    end = row[len(line) :]
    heading = HEADING.match(line)
    if heading is not None:
        opening, title, closing = heading.groups()
        return f"{opening.replace(' ', '')} {detokenize(title)} {closing.replace(' ', '')}{end}"
    line = QUOTED.sub(r'"\1"', line)
    for pattern, replacement in SPACES:
        line = pattern.sub(replacement, line)
    return line.strip(" ") + end
