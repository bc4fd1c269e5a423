"""The cost of matching a name with a regular expression of an untrusted file."""

from __future__ import annotations

import re

_MOST_WIDE = 4  # repetitions of what takes nearly any character: each one more is a power of the length
_MOST = 12  # of any
_TOKEN = re.compile(
    r"(?P<escape>\\.)"
    r"|(?P<set>\[\^?\]?(?:[^\]\\]|\\.)*\])"
    r"|(?P<open>\(\??)"
    r"|(?P<close>\))"
    r"|(?P<bar>\|)"
    r"|(?P<repeat>(?:[*+?]|\{(?!\})(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\})[?+]?)"
    r"|(?P<one>.)",
    re.DOTALL,
)
# a comment or, in verbose mode, a space may stand between a group and its repetition
_HIDDEN = re.compile(r"\(\?(?:#|[a-zA-Z]*x)")
_NARROW = re.compile(r"\\[^DSWsw]|\[[0-9-]*\]|[^.\\\[]", re.DOTALL)


def too_costly(expression: str) -> bool:
    """Whether matching some name with an expression may take more than a moment.

    It may if a group is repeated that can match the same text in several ways, as in `(a+)+` and
    `(a|a)*`: each character then doubles the time. And it may if many parts of any length follow each
    other. Some expressions that would be fast are among these.
    """
    if _HIDDEN.search(expression):
        return True
    groups = [False]  # whether what stands in each open group can match in several ways
    last, ways = "", False  # the part that a repetition is of; whether it is a group of several ways
    wide = repeated = 0
    for token in _TOKEN.finditer(expression):
        kind, text = token.lastgroup, token[0]
        if token["repeat"]:
            varies, many = True, text[0] != "?"
            if text[0] == "{":
                most = token["most"] if token["comma"] else token["least"]
                varies = most != token["least"]
                many = most not in {"0", "1"}
            if many and ways:
                return True
            if many and varies:
                repeated += 1
                wide += not _NARROW.fullmatch(last)
            groups[-1] |= varies
        elif kind == "open":
            groups.append(False)
        elif kind == "close" and len(groups) > 1:
            last, ways = "()", groups.pop()
            groups[-1] |= ways
        elif kind == "bar":
            groups[-1] = True
        else:
            last, ways = text, False
    return wide > _MOST_WIDE or repeated > _MOST
