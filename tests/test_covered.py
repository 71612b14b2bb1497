"""The table of what was converted says what comes of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import covered
from readme import put
from support.builders import config_of, group_config, module, quantised, weight_args
from support.builders import write_checkpoint as write
from support.paths import CHECKPOINTS

from ctconvert.layouts import TARGETS


def test_a_row_a_checkpoint(tmp_path: Path) -> None:
    group = group_config(weight_args(4, 32))
    tensors = module("a.down_proj", quantised(64, 96, group, 1))
    damaged = {name: tensor for name, tensor in tensors.items() if "scale" not in name}
    write(tmp_path / "b-damaged", damaged, config_of(group))
    write(tmp_path / "a-good", tensors, config_of(group))
    (tmp_path / "no checkpoint").mkdir()
    folders = [str(tmp_path), str(CHECKPOINTS / "smol-mixed-w4-w8-regex-ignore")]
    head, line, *rows = covered.table(covered.checkpoints(folders)).splitlines()
    assert head == f"| architecture | checkpoint | weights | {' | '.join(TARGETS)} |"
    assert line == "|" + "---|" * (3 + len(TARGETS))
    cells = {row.split(" | ")[1]: row.strip("| ").split(" | ") for row in rows[:3]}
    assert cells["a-good"] == ["Llama", "a-good", "int4 sym g32", *["ok"] * len(TARGETS)]
    assert cells["b-damaged"][2:] == ["not read", *["(1)"] * len(TARGETS)]
    mixed = dict(zip(TARGETS, cells["smol-mixed-w4-w8-regex-ignore"][3:], strict=True))
    assert mixed == dict.fromkeys(TARGETS, "ok") | {"cpu": "part (2)"}
    assert rows[3] == "" and "weight_scale is missing" in rows[4]
    assert rows[5].startswith("(2) 8-bit codes") and len(rows) == 6


def test_a_written_part_is_replaced_alone() -> None:
    text = "a\n<!-- covered -->\nold\nold\n<!-- end -->\nb\n<!-- other -->\nc\n<!-- end -->\n"
    made = put(text, "covered", r"new \1")
    assert made == text.replace("old\nold", r"new \1")
