"""MediaWiki markup to plain text: prose, headings and list items stay, the apparatus goes."""

from __future__ import annotations

import html
import re
from collections.abc import Callable

_COMMENT = re.compile(r"<!--.*?-->", re.S)
_SELF_CLOSED_REF = re.compile(r"<ref\b[^<>]*/>", re.I)
# Elements whose content is not prose.
_DROPPED = re.compile(
    r"<(ref|math|gallery|timeline|imagemap|score|syntaxhighlight|source|nowiki|code|chem|hiero)\b"
    r"[^<>]*>.*?</\1\s*>",
    re.S | re.I,
)
_BREAK = re.compile(r"<br\s*/?>", re.I)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATE = re.compile(r"\{\{\{[^{}]*\}\}\}|\{\{(?:[^{}]|\{(?!\{)|\}(?!\}))*\}\}")
_TABLE = re.compile(r"^[:*#; ]*\{\|(?:(?!^[:*#; ]*\{\|).)*?^\s*\|\}", re.S | re.M)
_LINK = re.compile(r"\[\[((?:[^\[\]]|\[(?!\[)|\](?!\]))*)\]\]")
_NO_PROSE = re.compile(r"\s*(?:File|Image|Category|[a-z]{2,3}(?:-[a-z]+)?)\s*:", re.I)
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:|//)[^\s\]]*\s*([^\]]*)\]")
_HEADING = re.compile(r"^(={2,6})\s*(.*?)\s*\1\s*$", re.M)
_QUOTES = re.compile(r"'{2,5}")
_LIST = re.compile(r"^[*#:;]+\s*", re.M)
_MAGIC = re.compile(r"__[A-Z]+__")
_EMPTY_BRACKETS = re.compile(r"\(\s*[,;]*\s*\)")
_SPACES = re.compile(r"[ \t\xa0]+")
_BLANK_LINES = re.compile(r"\n{3,}")
# What follows is lists of links in every article.
_TAIL = re.compile(
    r"^==\s*(?:References|Notes|Footnotes|External links|Further reading|See also|Bibliography)"
    r"\s*==\s*$",
    re.M | re.I,
)


def _link_text(link: re.Match) -> str:
    """Returns what a reader sees of [[target|text]]; nothing of pictures and categories."""
    return "" if _NO_PROSE.match(link[1]) else link[1].rpartition("|")[2]


def _remove_nested(
    pattern: re.Pattern, text: str, replacement: str | Callable[[re.Match], str] = ""
) -> str:
    """Replaces innermost matches until none is left."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def strip_wikitext(text: str) -> str:
    """Returns the plain text of an article's wikitext.

    References, templates, tables, media, formulas and the closing sections of links are removed;
    link texts, headings (as lines of their own) and list items are kept.
    """
    # Blocks that go as a whole; then links, whose texts stay, and the closing sections.
    text = _COMMENT.sub("", text)
    text = _SELF_CLOSED_REF.sub("", text)
    text = _remove_nested(_DROPPED, text)
    text = _remove_nested(_TEMPLATE, text)
    text = _remove_nested(_TABLE, text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _remove_nested(_LINK, text, _link_text)  # captions of pictures hold links of their own
    tail = _TAIL.search(text)
    if tail:
        text = text[: tail.start()]

    # Inline markup, then blanks.
    text = _BREAK.sub("\n", text)
    text = _TAG.sub("", text)
    text = _HEADING.sub(r"\n\2\n", text)
    text = _QUOTES.sub("", text)
    text = _LIST.sub("", text)
    text = _MAGIC.sub("", text)
    text = html.unescape(text)
    text = _EMPTY_BRACKETS.sub("", text)
    text = _SPACES.sub(" ", text)
    text = "\n".join(line.strip() for line in text.splitlines())
    return _BLANK_LINES.sub("\n\n", text).strip() + "\n"
