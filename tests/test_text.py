"""Text of others: one line, nothing that moves a cursor, whatever it was."""

import logging
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from fedkseed.text import JOINERS, VisibleFormatter, counted, one_line, visible

MOVES = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(st.text(st.characters() | st.characters(categories=list(MOVES))))
def test_any_text_becomes_one_harmless_line_and_stays_so(text: str) -> None:
    shown = visible(text)
    assert not any(unicodedata.category(c) in MOVES and c not in JOINERS for c in shown)
    assert len(shown.splitlines()) <= 1
    shown.encode()
    assert visible(shown) == shown


def test_what_people_write_is_left_alone() -> None:
    persian = "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    for text in ("client-1", "Zürich, 2 °C", "日本語", persian, "👩\u200d👧", "[/]", "a\u00a0b", "C:\\new"):
        assert visible(text) == text


def test_control_characters_are_shown() -> None:
    assert visible("a\nb\x1b[31m\r\x00\u2028\u202e\x9b\udc80") == r"a\nb\x1b[31m\r\x00\u2028\u202e\x9b\udc80"


def test_a_log_line_cannot_be_forged() -> None:
    record = logging.LogRecord("fedkseed", logging.WARNING, __file__, 1, "reply of %s", ("x\nfedkseed: done\x1b[2J",), None)
    assert VisibleFormatter().format(record) == r"reply of x\nfedkseed: done\x1b[2J"


def test_one_is_not_several() -> None:
    assert [counted(n, "round") for n in (0, 1, 2, 1200)] == ["0 rounds", "1 round", "2 rounds", "1,200 rounds"]
    assert [counted(n, "reply", "replies") for n in (1, 2)] == ["1 reply", "2 replies"]


def test_an_error_is_one_line_of_some_length() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert one_line(ValueError("x" * 161)) == "x" * 157 + "..."
    assert one_line(ValueError("x" * 80), 80) == "x" * 80
