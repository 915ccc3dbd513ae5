"""Which documents are left out for what they are: by language, by size, and by rules against what is not code.

The rules are those of DeepSeek-Coder (Guo et al. 2024, arXiv 2401.14196, section 2.1), most of them StarCoder's. They
leave out: lines of more than 100 characters on average or 1,000 at most; fewer than 25 % letters; an XML declaration in
the first 100 characters (but for XSLT); HTML with less than 20 % or 100 characters of visible text; JSON and YAML of
fewer than 50 or more than 5,000 characters. A third of their raw data was kept. A line's end is no character of it.
"""

import functools
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_DOCUMENT_BYTES = 1 << 30
"""The largest document that is read at all."""

LONGEST_MEAN_LINE = 100
LONGEST_LINE = 1000
LEAST_LETTERS = 0.25
XML_DECLARATION, XML_WITHIN = "<?xml version=", 100
LEAST_VISIBLE_SHARE, LEAST_VISIBLE = 0.2, 100
DATA_LANGUAGES, LEAST_DATA, MOST_DATA = ("json", "yaml"), 50, 5000

_NOT_LETTERS = bytes(code for code in range(256) if not chr(code).isascii() or not chr(code).isalpha())
_BLOCK = 1 << 20  # characters whose letters are counted in one piece
# What a browser does not show. Each alternative reaches to its end or the text's, so that nothing is scanned twice.
_INVISIBLE = re.compile(
    r"<(?:(script|style)\b.*?(?:</\1\s*>|\Z)|!--.*?(?:-->|\Z)|[^>]*(?:>|\Z))", re.IGNORECASE | re.DOTALL
)


@dataclass(frozen=True)
class Filters:
    """What is asked of a document.

    Attributes:
        languages: Names of the languages that stay; none means all. A document of an unknown language goes then.
        min_bytes, max_bytes: Bounds of its size in UTF-8.
        code: Whether DeepSeek-Coder's rules hold as well.
    """

    languages: tuple[str, ...] = ()
    min_bytes: int = 0
    max_bytes: int = MAX_DOCUMENT_BYTES
    code: bool = False

    def reason(self, text: str, language: str | None, num_bytes: int) -> str | None:
        """Why a document is left out, in a few words that are the same for all of their kind; None where it stays."""
        if self.languages and language not in self.languages:
            return "other language"
        if num_bytes < self.min_bytes:
            return "too small"
        if num_bytes > self.max_bytes:
            return "too large"
        return code_reason(text, language) if self.code else None


def code_reason(text: str, language: str | None) -> str | None:
    """Which of DeepSeek-Coder's rules a text breaks, the first one; None where it keeps all."""
    lines = text.split("\n")
    if len(text) - len(lines) + 1 > LONGEST_MEAN_LINE * len(lines):
        return "long lines"
    if len(max(lines, key=len)) > LONGEST_LINE:
        return "a long line"
    if num_letters(text) < LEAST_LETTERS * len(text):
        return "few letters"
    if language != "xslt" and XML_DECLARATION in text[:XML_WITHIN]:
        return "XML"
    if language == "html":
        num_visible = visible(text)
        if num_visible < LEAST_VISIBLE or num_visible < LEAST_VISIBLE_SHARE * len(text):
            return "HTML with little text"
    if language in DATA_LANGUAGES and not LEAST_DATA <= len(text) <= MOST_DATA:
        return "data"
    return None


def num_letters(text: str) -> int:
    """Characters that are letters, of any script."""
    if text.isascii():
        return len(text.encode("ascii").translate(None, _NOT_LETTERS))
    codes = (np.frombuffer(text[i : i + _BLOCK].encode("utf-32-le"), "<u4") for i in range(0, len(text), _BLOCK))
    return sum(int(np.count_nonzero(_letters()[block])) for block in codes)


def visible(text: str) -> int:
    """Characters of an HTML text that a browser would show, white space not counted."""
    return sum(map(len, _INVISIBLE.sub(" ", text).split()))


@functools.cache
def _letters() -> NDArray[np.bool_]:
    return np.fromiter((chr(code).isalpha() for code in range(0x110000)), np.bool_, 0x110000)
