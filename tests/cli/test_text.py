"""Texts that options are read from, and texts as people see them."""

from __future__ import annotations

import pytest

from ctconvert.cli.options import parse_counts, parse_layouts, parse_size
from ctconvert.cli.text import cells, collapse, printable, size, table
from ctconvert.errors import UsageError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("2GiB", 2 << 30),
        ("7", 7),
        ("1.5kb", 1500),
        ("0.001 kB", 1),
        ("4503599627370497.5KiB", 4503599627370497 * 1024 + 512),
        (str(2**63 - 1), 2**63 - 1),
    ],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text",
    [
        *("", "GB", "5iB", "-1GB", "0", "5 apples", "0.9", "\u0665GB", "9EB", "5GB" * 1000),
        *("9" * 400, "9" * 5000, "8388608TiB", str(2**63), "1." + "0" * 5000),
    ],
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match=r"size|shard") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 150


def test_layout_options_keep_their_order() -> None:
    texts = ["re:a=b$=marlin", "*.q=triton-wna16"]
    assert list(parse_layouts(texts).items()) == [("re:a=b$", "marlin"), ("*.q", "triton-wna16")]
    for text in ("marlin", "=marlin", "*.q=", ""):
        with pytest.raises(UsageError, match="PATTERN=LAYOUT"):
            parse_layouts([text])


def test_counts() -> None:
    assert parse_counts("1,16") == (1, 16)
    for text in ("", "0", "1,", "x", "-1", "1 2", "\u0661", "9" * 5000):
        with pytest.raises(UsageError, match="--m") as caught:
            parse_counts(text)
        assert len(str(caught.value)) < 150


def test_sizes_for_people() -> None:
    texts = ["0 B", "999 B", "1.00 kB", "4.95 MB", "1.61 GB", "2000.00 TB"]
    assert [size(n) for n in (0, 999, 1000, 4_950_000, 1_610_000_000, 2 * 10**15)] == texts


def test_rows_fold_over_layer_numbers() -> None:
    rows = [(f"layers.{i}.experts.{j}.up", ("x",)) for i in (0, 1, 2) for j in (3, 5)]
    assert collapse([*rows, ("layers.0.q", ("y",))]) == [
        ("layers.{0-2}.experts.{3,5}.up", "x", "6"),
        ("layers.0.q", "y", "1"),
    ]


@pytest.mark.parametrize(
    "name", ["a.00.q", "a.\u0663.q", f"a.{'9' * 5000}.q", "a\0b.c", "a.\0.1.c"]
)
def test_odd_numbers_in_names_do_not_fold(name: str) -> None:
    """Nothing is changed in a name but what does not print; one name stays one name."""
    assert collapse([(name, ())]) == [(printable(name), "1")]


def test_what_does_not_print_has_an_escape() -> None:
    assert printable("model.layers.0 é 模型") == "model.layers.0 é 模型"
    odd = "\x1b]0;x\x07\n\x7f\x9b\u202e\u200b\u2028\ud800\\"
    assert printable(odd) == r"\x1b]0;x\x07\n\x7f\x9b\u202e\u200b\u2028\ud800" + "\\"


def lines(rows: list[list[str]], width: int | None = None) -> list[str]:
    return [text for row in table(rows, width) for text in row]


def test_a_table_has_no_trailing_blanks_and_breaks_nothing() -> None:
    long = "model." + "x" * 300
    assert lines([["module", "n", ""], [long, "1", ""], ["b", "20", "z"]]) == [
        "module" + " " * 302 + "n",
        f"{long}  1",
        "b" + " " * 307 + "20  z",
    ]


def test_a_table_is_folded_to_a_screen() -> None:
    """Between words: no name is ever broken, even where it does not fit."""
    rows = [["module", "what"], ["model.layers.0", "one two three"]]
    head, gap = "module          what", " " * 16
    assert lines(rows, 29) == [head, "model.layers.0  one two three"]
    assert lines(rows, 24) == [head, "model.layers.0  one two", f"{gap}three"]
    narrow = [head, "model.layers.0  one", f"{gap}two", f"{gap}three"]
    assert lines(rows, 21) == lines(rows, 3) == narrow


def test_wide_characters_stay_in_their_column() -> None:
    found = lines([["模型", "b"], ["x", "c"], ["e\u0301", "d"]])
    assert [cells(line[:-1]) for line in found] == [6, 6, 6]
    assert lines([["模型 模型模型", "b"]], 15) == [f"模型{' ' * 10}b", "模型模型"]


def test_numbers_far_apart_are_not_counted_through() -> None:
    rows = [(f"model.layers.{number}.q_proj", ("int4",)) for number in (0, 1, 999_999_999)]
    assert collapse(rows) == [("model.layers.{0,1,999999999}.q_proj", "int4", "3")]
