"""Names and patterns mean what Python's ``re.match`` says, and never take long to say it."""

from __future__ import annotations

import re
import time
import warnings
from typing import Any

import pytest
from builders import config_of, group_config, weight_args
from hypothesis import given, settings
from hypothesis import strategies as st

from ctconvert.errors import BadInputError
from ctconvert.formats.patterns import Pattern, PatternError, Patterns
from ctconvert.formats.quantization import QuantizationSettings

NAMES = [
    "lm_head",
    "language_model.lm_head",
    "lm_headache",
    "visual.blocks.0.attn.qkv",
    "model.visual.merger",
    "model.layers.0.mlp.gate",
    "model.layers.0.mlp.gate\n",
    "model.layers.0.mlp.gate\n\n",
    "model.layers.0.mlpXgate",
    "model.layers.0.mlp.gate_proj",
    "model.layers.10.mlp.gate_proj",
    "model.layers.1.self_attn.q_proj",
    "Model.Layers.1.Self_Attn.Q_Proj",
    "model.layers.1.mlp.experts.17.down_proj",
    "model.layers.1.mlp.shared_expert.down_proj",
    "",
    "\n",
    "a\nlm_head",
    "a\tb\x00c",
    "a{e}",
    "[:alpha:]",
    "é.proj",
]
#: From checkpoints on the Hub and from this package's users, then what ``regex`` reads differently.
EXPRESSIONS = [
    r".*lm_head",
    r".*mlp.gate$",
    r".*mlp\.gate$",
    r"model\.layers\.(?!0\.).*",
    r"visual.*",
    r".*self_attn.*proj.*",
    r".*experts\.[0-9]+\..*proj$",
    r".*shared_expert.*proj$",
    r"(?i).*q_proj",
    r"(?i:MODEL).*",
    r".*(q|k|v|gate)_proj",
    r"^(?:model|language_model)\.",
    r"model\.layers\.[0-3]\.|lm_head",
    r".*(?<=self_attn\.)q_proj",
    r".*\d+.*\bdown_proj\b",
    r"model\.layers\.\d{1,2}\.mlp",
    r"(?s).*lm_head$",
    r"(?m).*^lm_head",
    r".",
    r"$",
    r"",
    r"[^.]*$",
    r"\W",
    r"a{e}",
    r"a{e<=1}",
    r"(?:lm_hea){e<=3}",
    r"[[:alpha:]]",
    r"[[:alpha:]]*\]",
    r"[a[]",
    r"[]a]",
    r"a{,}",
    r"a{}",
    r"a\{e\}",
    r"(?P<part>l)m_(?P=part)?",
    r"(l)?m?(?(1)m|x)",
    r"[+--_]",
    r"[\w&&\d]",
    r"[a||b]+",
    r"\u006c\U0000006d?_",
    r"\154m",
    r"\x6cm",
    r"é",
]


def expected(text: str, name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.match(text, name) is not None


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_pattern_is_what_re_matches(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pattern, listed = Pattern(text), Patterns([f"re:{text}"])
    for name in NAMES:
        assert pattern.match(name) == expected(text, name), name
        assert listed.any(name) == expected(text, name), name


ATOMS = [
    *("a", "ab", ".", r"\.", "[ab]", "[^a]", r"\d", "(a|b)", "(?:ab)", "(?=a)", "(?!b)", "(?<!a)"),
    *("$", "^", r"\b", "{", "}", "x{y}", "[[:alpha:]]", r"\-", "0", "(?i)", "|", "\n", "a{,}"),
    *("a{}", "[]a]", "[a[]", "(?i:A)", r"\n", r"\w", "é", r"\x61b", r"\141", r"\u0061"),
]
REPEATS = ["", "", "", "", "*", "+", "?", "{2}", "{1,2}", "*?", "+?", "{e<=1}"]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(ATOMS), st.sampled_from(REPEATS)), min_size=1, max_size=6),
    st.lists(st.text(alphabet="ab.0A\n{}x-é[:lph]", max_size=9), min_size=4, max_size=8),
)
def test_any_pattern_is_what_re_matches(parts: list[tuple[str, str]], names: list[str]) -> None:
    text = "".join(atom + repeat for atom, repeat in parts)
    try:
        expected(text, "")
    except (re.error, OverflowError):
        with pytest.raises(PatternError):
            Pattern(text)
        return
    found = Patterns([f"re:{text}"])
    for name in names:
        assert found.any(name) == expected(text, name), name


def test_the_first_entry_wins() -> None:
    found = Patterns(["re:.*b", "Linear", "ab", "re:a.*"])
    assert found.first("ab") == "re:.*b"
    assert found.first("ac", "Linear") == "Linear"
    assert found.first("ac") == "re:a.*"
    assert found.first("c") is None
    assert found.first("b\n") is None or expected(".*b", "b\n")


#: Endless for re, or too much to compile for regex.
EVIL = [r"(a|aa)+$", r"(?:a|aa|aaa)+$", r"(?:(?:a|aa)+|b)+$"]
HUGE = [
    "a" * 1001,
    r"(a{1000}){1000}",
    r"((a{1000}){1000}){1000}",
    "(" * 30 + "a" + ")+" * 30,
    "(" * 400 + "a" + ")" * 400,
    r"a{99999999999}",
    r"(?x)a # )",
    r"(?#()a",
]
WRONG = ["(", "*", "[", r"\p{L}", "a(?i)b(", "(?R)", "(?<=a*)b", r"(((a{1000}){1000}){1000}"]


@pytest.mark.parametrize("text", EVIL)
def test_a_pattern_that_takes_too_long_is_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctconvert.formats.patterns._SECONDS", 0.2)
    names = ["a" * 40 + "!" * count for count in range(200)]
    found = Patterns([f"re:{text}"])
    started = time.thread_time()
    with pytest.raises(PatternError, match="takes too long") as caught:
        for name in names:
            found.any(name)
    assert time.thread_time() - started < 2
    assert repr(f"re:{text}") in str(caught.value)


@pytest.mark.parametrize("text", [*HUGE, *WRONG], ids=range(len(HUGE) + len(WRONG)))
def test_a_pattern_that_does_not_compile_is_named(text: str) -> None:
    started = time.thread_time()
    with pytest.raises(PatternError) as caught:
        Pattern(text)
    assert time.thread_time() - started < 1
    assert str(caught.value).startswith("'re:" + repr(text[:10])[1:-1])
    assert "\n" not in str(caught.value)


def test_a_name_of_any_length_is_matched_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three loops are cubic: harmless on names as they are, not on one of 100 000 characters."""
    monkeypatch.setattr("ctconvert.formats.patterns._SECONDS", 0.2)
    with pytest.raises(PatternError, match="takes too long"):
        Patterns(["re:.*a.*a.*[bd]"]).any("a" * 100_000 + "c")


def configured(**more: Any) -> QuantizationSettings:
    targets = ["re:.*self_attn.*proj$", "re:.*experts\\.[0-9]+\\..*proj$", "Embedding"]
    config = config_of(group_config(weight_args(4, 32), targets), **more)
    return QuantizationSettings.parse({"quantization_config": config}, "config.json")


def test_a_config_names_its_slow_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctconvert.formats.patterns._SECONDS", 0.2)
    with pytest.raises(BadInputError, match=r"config\.json: quantization_config: .*\(a\|aa\)\+\$"):
        configured(ignore=["re:(a|aa)+$"]).scheme_of("a" * 60 + "!", "Linear")


def large_model() -> list[str]:
    names = []
    for layer in range(60):
        names += [f"model.layers.{layer}.self_attn.{leaf}_proj" for leaf in "qkvo"]
        names += [
            f"model.layers.{layer}.mlp.experts.{expert}.{leaf}_proj"
            for expert in range(388)
            for leaf in ("gate", "up", "down")
        ]
    return names


IGNORE = [
    *(f"model.layers.{layer}.self_attn.o_proj" for layer in range(150)),
    *(rf"re:.*layers\.{layer}\.mlp\.gate$" for layer in range(60)),
    *(rf"re:model\.layers\.{layer}\.mlp\.shared_expert.*" for layer in range(60)),
    *(
        "re:.*lm_head",
        "re:.*mlp.gate$",
        "re:visual.*",
        r"re:model\.layers\.6(?!0).*nothing",
        "lm_head",
    ),
    *(f"re:vision_tower.*{layer}.*" for layer in range(25)),
]
ROTATED = {
    "config_groups": {
        "R1": {"apply": [{"targets": ["re:.*q_proj$"]}, {"targets": ["re:.*experts.*up_proj$"]}]}
    }
}


def test_a_large_model_is_matched_in_a_second() -> None:
    names = large_model()
    assert len(names) > 70_000
    assert len(IGNORE) == 300
    started = time.process_time()
    plain = configured(ignore=IGNORE)
    found = sum(plain.scheme_of_quantised(name) is not None for name in names)
    taken = time.process_time() - started
    assert found == len(names) - 60
    assert taken < 3, f"{taken:.2f} s"


def test_transforms_of_a_large_model_are_matched_in_a_second() -> None:
    names = large_model()
    rotated = configured(transform_config=ROTATED)
    started = time.process_time()
    assert sum(rotated.transformed(name, "Linear") for name in names) == 60 + 60 * 388
    assert rotated.transforms_elsewhere(names, [*names, "model.norm"]) is None
    taken = time.process_time() - started
    assert taken < 3, f"{taken:.2f} s"
