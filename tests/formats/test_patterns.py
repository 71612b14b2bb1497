"""Names and patterns mean what Python's ``re.match`` says, and never take long to say it."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import config_of, group_config, weight_args

from ctconvert.errors import BadInputError
from ctconvert.formats.patterns import Pattern, PatternError, Patterns
from ctconvert.formats.quantization import QuantizationSettings

NAMES = [
    "lm_head",
    "language_model.lm_head",
    "lm_headache",
    "visual.blocks.0.attn.qkv",
    "model.layers.0.mlp.gate",
    "model.layers.0.mlpXgate",
    "model.layers.0.mlp.gate_proj",
    "model.layers.10.mlp.gate_proj",
    "model.layers.1.self_attn.q_proj",
    "Model.Layers.1.Self_Attn.Q_Proj",
    "model.layers.1.mlp.experts.17.down_proj",
    "model.layers.1.mlp.shared_expert.down_proj",
    "",
    "a\nlm_head",
    "a{e}",
    "é.proj",
]
#: From checkpoints on the Hub and from users.
EXPRESSIONS = [
    r".*lm_head",
    r".*mlp.gate$",
    r".*mlp\.gate$",
    r"visual.*",
    r".*self_attn.*proj.*",
    r".*experts\.[0-9]+\..*proj$",
    r"(?i).*q_proj",
    r"(?i:MODEL).*",
    r".*(q|k|v|gate)_proj",
    r"^(?:model|language_model)\.",
    r"model\.layers\.[0-3]\.|lm_head",
    r".*\d+.*\bdown_proj\b",
    r"model\.layers\.\d{1,2}\.mlp",
    r"(?s).*lm_head$",
    r"(?m).*^lm_head",
    r".",
    r"$",
    r"",
    r"[^.]*$",
    r"a{e}",
    r"a\{e\}",
    r"[]a]",
    r"[+--_]",
    r"\x6cm",
    r"é",
]
EVIL = [r"(a|aa)+$", r"(?:a|aa|aaa)+$", r"(?:(?:a|aa)+|b)+$", r"(a+)+$", "(.*a){20}b"]
REFUSED = [
    "a" * 1001,
    r"(a{1000}){1000}",
    r"((a{1000}){1000}){1000}",
    "(" * 600 + "a" + ")" * 399,
    r"a{99999999999}",
    r"model\.layers\.(?!0\.).*",
    r".*(?<=self_attn\.)q_proj",
    r"(?P<part>l)m_(?P=part)?",
    r"a{,3}",
    r"[[:alpha:]]",
    *("(", "*", "[", r"\p{L}", "a(?i)b(", "(?R)", "(?<=a*)b"),
]


def expected(text: str, name: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.match(text, name) is not None


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_a_pattern_is_what_re_matches(text: str) -> None:
    pattern, listed = Pattern(text), Patterns([f"re:{text}"])
    for name in NAMES:
        assert pattern.match(name) == expected(text, name), name
        assert listed.any(name) == expected(text, name), name


@pytest.mark.parametrize("first", EXPRESSIONS)
def test_several_patterns_are_each_what_re_matches(first: str) -> None:
    for second in EXPRESSIONS:
        texts = list(dict.fromkeys([first, second]))
        listed = Patterns([f"re:{text}" for text in texts])
        for name in NAMES:
            want = [f"re:{text}" for text in texts if expected(text, name)]
            assert listed.all(name) == want, (texts, name)


ATOMS = [
    *("a", "ab", ".", r"\.", "[ab]", "[^a]", r"\d", "(a|b)", "(?:ab)", "$", "^", r"\b", "}"),
    *("x{y}", r"\-", "0", "|", "[]a]", "(?i:A)", r"\w", "é", r"\x61b"),
]
REPEATS = ["", "", "", "", "*", "+", "?", "{2}", "{1,2}", "*?", "+?"]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(ATOMS), st.sampled_from(REPEATS)), min_size=1, max_size=6),
    st.lists(st.text(alphabet="ab.0A{}x-é", max_size=9), min_size=4, max_size=8),
)
def test_any_pattern_is_what_re_matches(parts: list[tuple[str, str]], names: list[str]) -> None:
    text = "".join(atom + repeat for atom, repeat in parts)
    try:
        expected(text, "")
        found = Patterns([f"re:{text}"])
    except (re.error, PatternError):
        return
    for name in names:
        assert found.any(name) == expected(text, name), name


def test_the_first_entry_wins() -> None:
    found = Patterns(["b", "re:a.*", "Linear", "ab", "re:ab"])
    assert found.first("b") == "b"
    assert found.first("ab") == "re:a.*"
    assert found.first("c", "Linear") == "Linear"
    assert found.first("c") is None
    assert found.any("c", "Linear") and not found.any("c", "Embedding")
    assert not Patterns() and found


@pytest.mark.parametrize("text", EVIL)
def test_a_pattern_that_never_ends_for_re_ends(text: str) -> None:
    found = Patterns([f"re:{text}"])
    started = time.thread_time()
    for count in range(200):
        found.any("a" * 4000 + "!" * count)
    assert time.thread_time() - started < 2


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_a_pattern_that_cannot_be_used_is_named(text: str) -> None:
    started = time.thread_time()
    with pytest.raises(PatternError) as caught:
        Pattern(text)
    assert time.thread_time() - started < 1
    assert str(caught.value).startswith("'re:" + repr(text[:10])[1:-1])
    assert "\n" not in str(caught.value)


def test_a_config_names_its_pattern() -> None:
    config = {
        "quantization_config": config_of(
            group_config(weight_args(4, 32)), ignore=["lm_head", r"re:(?!x).*"]
        )
    }
    with pytest.raises(BadInputError, match=r"config: quantization_config\.ignore: 're:\(\?!x"):
        QuantizationSettings.parse(config, "config")


def test_a_large_model_is_matched_soon() -> None:
    ignore = ["lm_head", *(f"re:.*layers\\.{index}\\.self_attn.*" for index in range(8))]
    config = {"quantization_config": config_of(group_config(weight_args(4, 32)), ignore=ignore)}
    found = QuantizationSettings.parse(config, "config")
    started = time.thread_time()
    for layer in range(61):
        for expert in range(384):
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}"
                assert found.schemes_of_quantised(name)
    assert time.thread_time() - started < 6
