"""The light reader against compressed-tensors' own models: the same verdict, the same values."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from itertools import product
from typing import Any

import pytest
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builders import config_of, group_config, weight_args
from support.paths import CHECKPOINTS, EXAMPLE, ROOT
from support.versions import needs_judge

from ctconvert.errors import BadInputError
from ctconvert.formats.quantization import FORMAT_NAMES, QuantizationSettings, Scheme
from ctconvert.formats.quantization.presets import PRESETS
from ctconvert.formats.quantization.reading import ENDS, UnreadError, is_group_order, read_group

CONFIGS = [
    *sorted(CHECKPOINTS.glob("*/config.json")),
    EXAMPLE / "config.json",
    *sorted((ROOT / "tests" / "formats" / "configs").glob("*.json")),
]


def theirs(name: str, group: Any) -> QuantizationScheme | None:
    """compressed-tensors' model, None where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if isinstance(group, list):
                return preset_name_to_scheme(name, group)
            return QuantizationScheme.model_validate(group)
        except (ValueError, KeyError, NotImplementedError, TypeError, AttributeError):
            return None


def assert_same(ours: Scheme, model: QuantizationScheme) -> None:
    """Written out field by field: the package's own conversion must not judge itself."""
    assert list(ours.targets) == model.targets
    assert ours.format == model.format
    for end in ENDS:
        args, other = getattr(ours, end), getattr(model, end)
        assert (args is None) == (other is None), end
        if args is None:
            continue
        assert args.num_bits == other.num_bits
        assert args.type == other.type
        assert args.symmetric is other.symmetric
        assert args.group_size == other.group_size
        assert args.strategy == other.strategy
        assert args.dynamic == other.dynamic
        block = args.block_structure
        assert (None if block is None else list(block)) == other.block_structure
        order = {"static": "weight", False: None}.get(other.actorder, other.actorder)
        assert args.actorder == order
        for dtype in ("scale_dtype", "zp_dtype"):
            value = getattr(other, dtype)
            assert getattr(args, dtype) == (value and str(value).removeprefix("torch."))


def test_the_formats_are_theirs() -> None:
    assert {item.value for item in CompressionFormat} <= set(FORMAT_NAMES)


@pytest.mark.parametrize("name", PRESET_SCHEMES)
def test_presets(name: str) -> None:
    assert_same(read_group(name.lower(), ["Linear"]), preset_name_to_scheme(name, ["Linear"]))


@needs_judge("it has fewer presets")
def test_no_preset_is_invented() -> None:
    assert PRESETS.keys() == PRESET_SCHEMES.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_real_configs(path: Any) -> None:
    config = json.loads(path.read_text())["quantization_config"]
    for name, group in config.get("config_groups", {}).items():
        ours = read_group(name, group)
        weights = group["weights"]
        if is_group_order(weights.get("actorder")):
            assert ours.weights is not None
            assert ours.weights.actorder == "group"
            weights["actorder"] = None
            ours = read_group(name, group)
        model = theirs(name, group)
        assert model is not None
        assert_same(ours, model)


def args(valid: bool) -> st.SearchStrategy[dict[str, Any]]:
    """``weights`` or activations; where not ``valid``, mostly what nobody should write."""
    odd: list[Any] = [] if valid else ["4", 4.0, 0, -5, 1.5, "x", None, [1], {}, 10**9, "1"]

    def of(*values: Any) -> st.SearchStrategy[Any]:
        return st.sampled_from([*values, *odd])

    sound = st.sampled_from(
        [
            {"strategy": "group", "group_size": 32},
            {"group_size": 128},
            {"group_size": -1},
            {"strategy": "channel", "group_size": None},
            {"strategy": "tensor"},
            {"strategy": "block", "block_structure": [128, 64]},
            {"strategy": "token", "dynamic": True},
            {"strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
        ]
    )
    return st.one_of(
        st.builds(
            lambda kind, rest: kind | rest,
            st.fixed_dictionaries(
                {"num_bits": of(4, 8), "type": of("int", "float")}, optional={"symmetric": of(True)}
            ),
            sound,
        ),
        _any_args(valid, of),
    )


def _any_args(valid: bool, of: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "num_bits": of(2, 4, 6, 8, 16),
            "type": of("int", "float"),
            "symmetric": of(True, False),
            "group_size": of(None, -1, 32, 128),
            "strategy": of(
                None, "tensor", "channel", "group", "block", "tensor_group", "token", "attn_head"
            ),
            "block_structure": of(None, [128, 128]),
            "dynamic": of(True, False, "local"),
            "actorder": of(None, False, "weight", "static"),
            "scale_dtype": of(None, "torch.uint8", "float8_e4m3fn"),
            "zp_dtype": of(None, "torch.int8", "uint8"),
            "observer": of(None, "minmax"),
            "observer_kwargs": st.sampled_from([{}, {"a": 1}] if valid else [{}, None, [1], "x"]),
            **({} if valid else {"later": st.just(1)}),
        },
    )


def schemes(valid: bool) -> st.SearchStrategy[dict[str, Any]]:
    odd: list[Any] = [] if valid else [5, "x", None, [], {}, ["Linear", 3]]
    end = st.none() | args(valid)
    return st.fixed_dictionaries(
        {"targets": st.sampled_from([["Linear"], ["re:.*q_proj", "lm_head"], *odd])},
        optional={
            "weights": end,
            "input_activations": end,
            "output_activations": end,
            "format": st.sampled_from([None, "dense", *FORMAT_NAMES, *odd]),
        },
    )


def plausible(group: dict[str, Any]) -> bool:
    """Not among the few values that compressed-tensors takes and that mean nothing."""
    for end in ENDS:
        found = group.get(end) or {}
        for key in ("num_bits", "group_size"):
            value = float(found.get(key) or 1) if found.get(key) not in ("x", [1], {}) else 1
            if not (-1 <= value < 2**31):
                return False
        if found.get("num_bits") is not None and found["num_bits"] in (0, -5, 10**9):
            return False
        if found.get("actorder") in (0, 1, "1", 4, 4.0, "0") and found["actorder"] is not False:
            return False
    return True


def check(group: dict[str, Any]) -> None:
    model = theirs("group_0", group)
    try:
        light: Scheme | None = read_group("group_0", group)
    except UnreadError:
        light = None
    if light is not None:
        assert model is not None, "the light reader takes what compressed-tensors refuses"
        assert_same(light, model)
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    try:
        found = QuantizationSettings.parse({"quantization_config": config}, "config.json")
    except BadInputError as error:
        assert "\n" not in str(error)
        assert model is None or not plausible(group), str(error)
        return
    assert model is not None
    assert_same(found._groups["group_0"][0], model)


@needs_judge("it has fewer formats")
@settings(max_examples=300, derandomize=True, deadline=None)
@given(schemes(valid=True))
def test_what_can_be_written_is_read_alike(group: dict[str, Any]) -> None:
    check(group)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(schemes(valid=False))
def test_what_nobody_should_write_is_judged_alike(group: dict[str, Any]) -> None:
    check(group)


def judged(group: dict[str, Any]) -> bool:
    """Whether both take it, with the same values; they must agree."""
    model = theirs("group_0", group)
    try:
        light = read_group("group_0", group)
    except UnreadError:
        assert model is None, group
        return False
    assert model is not None, group
    assert_same(light, model)
    return True


STRATEGIES = (None, "tensor", "channel", "group", "block", "tensor_group", "token", "attn_head")


def test_every_combination_of_what_depends_on_another() -> None:
    taken = 0
    for strategy, size, block, dynamic in product(
        STRATEGIES, (None, -2, -1, 0, 1, 128), (None, [8, 16]), (False, True, "local")
    ):
        found = {
            "strategy": strategy,
            "group_size": size,
            "block_structure": block,
            "dynamic": dynamic,
        }
        for end in ENDS:
            taken += judged({"targets": ["Linear"], end: found})
    assert taken > 50


@needs_judge("it has no floats of 6 bits")
def test_every_width_has_its_zero_points() -> None:
    for bits, kind, zero in product(range(1, 33), ("int", "float"), (None, "torch.uint8")):
        judged({"targets": [], "weights": {"num_bits": bits, "type": kind, "zp_dtype": zero}})


@pytest.mark.parametrize("order", [None, False, "weight", "static"])
@pytest.mark.parametrize("end", ENDS)
def test_an_order_is_for_weights(end: str, order: Any) -> None:
    group = {"targets": ["Linear"], end: {"actorder": order}}
    assert judged(group) == (end == "weights" or not order)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(args(valid=True))
def test_the_light_reader_needs_no_help_where_values_are_as_they_are_written(
    weights: dict[str, Any],
) -> None:
    group = {"targets": ["Linear"], "weights": weights}
    model = theirs("group_0", group)
    if model is not None:
        assert_same(read_group("group_0", group), model)


HEAVY = {"torch", "pydantic", "compressed_tensors", "transformers", "triton", "numpy"}


def test_a_config_as_it_is_written_loads_nothing_heavy() -> None:
    code = (
        "import json, sys\n"
        "from ctconvert.formats.quantization import QuantizationSettings\n"
        "parsed = QuantizationSettings.parse(json.load(sys.stdin), 'config.json')\n"
        "assert parsed.schemes_of_quantised('model.layers.0.mlp.up_proj')\n"
        "print(*sys.modules)\n"
    )
    config = config_of(group_config(weight_args(4, 32, actorder="group")))
    made = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps({"quantization_config": config}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert not HEAVY & set(made.stdout.split())


def test_what_is_not_known_goes_to_compressed_tensors() -> None:
    config = config_of(group_config(weight_args("4", 32)))
    parsed = QuantizationSettings.parse({"quantization_config": config}, "config.json")
    (found,) = parsed.schemes_of("q_proj", "Linear")
    assert found.weights is not None
    assert found.weights.num_bits == 4


def test_a_group_order_survives_the_hand_over() -> None:
    config = config_of(group_config(weight_args("4", 32, actorder="group")))
    parsed = QuantizationSettings.parse({"quantization_config": config}, "config.json")
    (found,) = parsed.schemes_of("q_proj", "Linear")
    assert found.actorder_group


def test_without_compressed_tensors_the_field_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    config = config_of(group_config(weight_args(4, 32, later=1)))
    with pytest.raises(
        BadInputError, match=r"config_groups\.group_0\.weights\.later: is no known field; install"
    ):
        QuantizationSettings.parse({"quantization_config": config}, "config.json")
