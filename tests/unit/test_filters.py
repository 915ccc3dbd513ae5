"""megacode.data.preparing.filters and languages: which documents are left out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacode.data.preparing.filters import Filters, code_reason, num_letters, visible
from megacode.data.preparing.languages import language_of, suffixes_of

CODE = "def f(x):\n    return x + 1\n"


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        (CODE, "python", None),
        ("a" * 100, None, None),
        ("a" * 101, None, "long lines"),
        ("a" * 201 + "\n", None, "long lines"),
        ("a" * 200 + "\n", None, None),
        ("a\n" * 20 + "b" * 1000, None, None),
        ("a\n" * 20 + "b" * 1001, None, "a long line"),
        ("é\n" * 20 + "é" * 1000, None, None),
        ("a" * 25 + "1" * 75, None, None),
        ("a" * 24 + "1" * 76, None, "few letters"),
        ("中" * 25 + "1" * 75, None, None),
        ("中" * 24 + "\u0661" * 76, None, "few letters"),
        ('<?xml version="1.0"?>\n<a>text</a>\n', "xml", "XML"),
        ('<?xml version="1.0"?>\n<a>text</a>\n', "xslt", None),
        ("<!-- " + "a" * 82 + '-->\n<?xml version="1.0"?>', "xml", None),
        ("<p>" + "word " * 19 + "</p>\n", "html", "HTML with little text"),
        ("<p>" + "word\n" * 25 + "</p>\n", "html", None),
        ("<p>" + "word\n" * 25 + "</p>\n" + "<br class='nothing to see'>\n" * 20, "html", "HTML with little text"),
        ("<p>" + "word\n" * 25 + "</p>\n" + "<br class='nothing to see'>\n" * 20, "vue", None),
        ('{"a": "' + "b" * 40 + '"}', "json", "data"),
        ('{"a": "' + "b" * 41 + '"}', "json", None),
        ("a: b\n" * 1001, "yaml", "data"),
        ("a: b\n" * 1000, "yaml", None),
    ],
)
def test_rules_of_deepseek_coder(text, language, reason):
    assert code_reason(text, language) == reason
    assert Filters(code=True).reason(text, language, 1) == reason
    assert Filters().reason(text, language, 1) is None


def test_language_and_size():
    filters = Filters(languages=("c", "python"), min_bytes=3, max_bytes=5)
    assert [filters.reason("", "c", size) for size in (2, 3, 5, 6)] == ["too small", None, None, "too large"]
    assert [filters.reason("", language, 4) for language in ("python", "java", None)] == [None, *["other language"] * 2]


@given(st.text(max_size=50))
def test_letters_are_those_of_unicode(text):
    assert num_letters(text) == sum(map(str.isalpha, text))


def test_letters_are_counted_in_blocks(monkeypatch):
    monkeypatch.setattr("megacode.data.preparing.filters._BLOCK", 2)
    assert num_letters("aé1b中") == 4


def test_visible_text():
    html = "<html><style>p {}</style><SCRIPT src='x'>if (a < b) {}</script ><!-- no > --><p class='a'>one <b>two</b>"
    assert visible(html) == len("onetwo")
    assert visible("one <script>two") == visible("one <!-- two") == visible("one <two") == 3
    assert visible("<scripts>one</scripts>") == 3


@pytest.mark.parametrize("text", ["<", "<script", "<!--", "<a", "<style>", "-->", "</script>"])
def test_no_text_takes_quadratic_time(text):
    # A million repetitions, quadratic, would be hours.
    visible(text * 10**6)


def test_languages_by_name():
    names = ["a/b.py", "x.CPP", "Makefile", "src/CMakeLists.txt", "Dockerfile", "a.tar.gz", "c", "x.xsl", "a.ipynb"]
    found = ["python", "c++", "makefile", "cmake", "dockerfile", None, None, "xslt", "jupyter notebook"]
    assert [language_of(name) for name in names] == found
    assert suffixes_of("c++")[:2] == (".cc", ".cpp")
    assert suffixes_of("klingon") == ()
    assert all(language_of(f"x{suffix}") == name for name in ("c", "rust", "java") for suffix in suffixes_of(name))
