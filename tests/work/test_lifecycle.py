"""What a run takes over, what it replaces, and what it leaves alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support import faults
from support.executors import Inline
from support.models import module_name, options, plan_of, repack, restore, tree
from support.stores import Plain

from ctconvert import api
from ctconvert.errors import BadInputError, ConversionError, UsageError, VerificationError
from ctconvert.progress import Silent
from ctconvert.runtime.loading import Loader
from ctconvert.store.local import LocalStore
from ctconvert.store.places import recover
from ctconvert.work.build import Settings, build
from ctconvert.work.journal import Commit, read_journal

if TYPE_CHECKING:
    from .conftest import Place

Whole = dict[str, str]


def flip(path: Path, at: int = -1) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def replaced_unseen(path: Path) -> None:
    """Another file of the same name, size and modification time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    other = path.with_name("other")
    other.write_bytes(data)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def rewritten_unseen(path: Path) -> None:
    """The same file, written over in place, its modification time set back."""
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino


# --- an OUT that is somebody else's --------------------------------------------------------------


def a_folder(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")


def a_file(out: Path) -> None:
    out.write_text("mine")


def a_link(out: Path) -> None:
    out.symlink_to("model")


def another_conversion(out: Path) -> None:
    other = out.with_name("other")
    repack(out.parent / "model", other, asked=options(max_shard_size=1_000_000))
    other.rename(out)


@pytest.mark.parametrize("theirs", [a_folder, a_file, a_link, another_conversion])
@pytest.mark.parametrize("verb", ["repack", "restore"])
def test_an_out_that_somebody_else_makes_meanwhile_is_left_alone(
    place: Place,
    converted: Path,
    whole: Whole,
    restored: Whole,
    verb: str,
    theirs: Callable[[Path], None],
) -> None:
    run, source, want = {
        "repack": (repack, place.model, whole),
        "restore": (restore, converted, restored),
    }[verb]
    with pytest.raises(ConversionError, match=r"out: .*left alone.*--resume"):
        run(source, place.out, executor=Inline(lambda: theirs(place.out)))
    kept = tree(place.out) or place.out.read_text()
    with pytest.raises(UsageError, match=r"exists|no directory|is the source"):
        run(source, place.out, resume=True)
    assert (tree(place.out) or place.out.read_text()) == kept
    assert len(place.finished()) == 3
    place.out.rename(place.folder / "theirs")
    again = Inline()
    assert run(source, place.out, executor=again, resume=True).resumed_shards == 3
    assert again.wrote == []
    assert tree(place.out) == want and not place.partial.exists()


def test_an_empty_folder_is_no_out(place: Place, whole: Whole) -> None:
    place.out.mkdir()
    repack(place.model, place.out)
    assert tree(place.out) == whole


@pytest.mark.parametrize("flags", [{"overwrite": True}, {}])
@pytest.mark.parametrize(
    "add",
    [
        lambda out: (out / "notes.txt").write_text("mine"),
        lambda out: (out / ".git").mkdir() or (out / ".git" / "HEAD").write_text("ref"),
        lambda out: (out / "mine").mkdir() or (out / "mine" / "model.bin").write_text(""),
        lambda out: (out / "elsewhere").symlink_to(out.parent),
        lambda out: (out / "nothing").symlink_to("gone"),
        lambda out: os.mkfifo(out / "fifo"),
        lambda out: (out / "ctconvert.json").unlink(),
        lambda out: (out / "ctconvert.json").write_text("{"),
        lambda out: (out / "ctconvert.json").write_text('{"tool": {"name": "x"}, "files": {}}'),
        lambda out: shutil.rmtree(out) or out.write_text("mine"),
    ],
    ids=["file", ".git", "folder", "link", "dangling", "fifo", "bare", "cut", "other", "no folder"],
)
def test_only_what_ctconvert_made_is_replaced(
    place: Place, add: Callable[[Path], object], flags: dict[str, bool]
) -> None:
    another_conversion(place.out)
    add(place.out)
    before = {path.name for path in place.out.iterdir()} if place.out.is_dir() else "mine"
    with pytest.raises(UsageError, match="out"):
        repack(place.model, place.out, **flags)
    after = {path.name for path in place.out.iterdir()} if place.out.is_dir() else "mine"
    assert after == before and place.names <= {"model", "out"}


def test_what_is_added_to_out_during_a_run_is_kept(place: Place, whole: Whole) -> None:
    """It was replaceable when the run began, and no longer is when it ends."""
    another_conversion(place.out)
    notes = place.out / "notes.txt"
    with pytest.raises(ConversionError, match=r"notes\.txt.*left alone"):
        executor = Inline(lambda: notes.write_text("mine"))
        repack(place.model, place.out, executor=executor, overwrite=True)
    assert notes.read_text() == "mine"
    notes.unlink()
    assert repack(place.model, place.out, resume=True).resumed_shards == 3
    assert tree(place.out) == whole and place.is_clean


def test_an_output_of_the_first_version_of_the_manifest_is_replaced(
    place: Place, whole: Whole
) -> None:
    """Its files were a mapping."""
    another_conversion(place.out)
    files = {path.name: {} for path in place.out.rglob("*") if path.name != "ctconvert.json"}
    files["templates/chat.jinja"] = {}
    manifest = {"format_version": 1, "tool": {"name": "ctconvert"}, "files": files}
    (place.out / "ctconvert.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="--overwrite"):
        repack(place.model, place.out)
    repack(place.model, place.out, overwrite=True)
    assert tree(place.out) == whole


def test_a_link_to_an_output_is_followed(place: Place, whole: Whole) -> None:
    """Beside what it leads to lies the partial output, on the same disk."""
    elsewhere = place.folder / "elsewhere"
    elsewhere.mkdir()
    another_conversion(place.out)
    place.out.rename(elsewhere / "real")
    place.out.symlink_to("elsewhere/real")
    repack(place.model, place.out, overwrite=True)
    assert place.out.is_symlink() and tree(elsewhere / "real") == whole


# --- places where no output may be ---------------------------------------------------------------


@pytest.mark.parametrize("verb", ["repack", "restore"])
@pytest.mark.parametrize(
    ("current", "out"),
    [
        ("work", "."),
        ("work", "../work"),
        ("work/deep", ".."),
        ("work/deep", "../.."),
        ("work", ""),
        ("link", "."),
    ],
)
def test_the_current_directory_and_its_parents_are_no_output(
    place: Place,
    converted: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    current: str,
    out: str,
) -> None:
    source = place.folder.parent / "elsewhere"
    (place.model if verb == "repack" else converted).rename(source)
    (place.folder / "work" / "deep").mkdir(parents=True)
    (place.folder / "link").symlink_to("work")
    monkeypatch.chdir(place.folder / current)
    before = tree(place.folder)
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match="current directory"):
            if verb == "repack":
                api.repack(source, out, target="triton", workers=1, **flags)
            else:
                api.restore(source, out, workers=1, **flags)
    assert tree(place.folder) == before
    source.rename(place.folder / "moved")


@pytest.mark.parametrize("out", ["model", "model/inside", "model/a/b", ".", "link", "link/inside"])
def test_the_source_is_no_output(place: Place, out: str) -> None:
    (place.folder / "link").symlink_to("model")
    before = tree(place.folder)
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match="source"):
            repack(place.model, place.folder / out, **flags)
    assert tree(place.folder) == before


def test_the_partial_output_is_not_made_in_the_source(place: Place) -> None:
    source = place.folder / "x.partial"
    place.model.rename(source)
    with pytest.raises(UsageError, match="source"):
        repack(source, place.folder / "x", overwrite=True)
    assert place.names == {"x.partial"}


def test_something_else_in_the_place_of_the_partial_output_is_left_alone(place: Place) -> None:
    place.partial.mkdir()
    (place.partial / "notes.txt").write_text("mine")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match=r"out\.partial is in the way"):
            repack(place.model, place.out, **flags)
    assert (place.partial / "notes.txt").read_text() == "mine"


def test_a_parent_that_is_no_folder(place: Place) -> None:
    (place.folder / "file").write_text("")
    with pytest.raises((ConversionError, UsageError), match="Not a directory"):
        repack(place.model, place.folder / "file" / "out")


# --- what is taken over --------------------------------------------------------------------------


def test_finished_shards_are_taken_over(place: Place, whole: Whole) -> None:
    finished = place.killed()
    with pytest.raises(UsageError, match=r"unfinished.*--resume"):
        repack(place.model, place.out)
    with pytest.raises(UsageError, match="contradict"):
        repack(place.model, place.out, resume=True, overwrite=True)
    again = Inline()
    assert repack(place.model, place.out, executor=again, resume=True).resumed_shards == finished
    assert 0 < len(again.wrote) < 8
    assert tree(place.out) == whole and place.is_clean


def test_each_run_takes_over_what_all_before_it_have_finished(place: Place, whole: Whole) -> None:
    assert place.killed(after=4) == 1
    assert place.killed(after=4, resume=True) == 2
    assert repack(place.model, place.out, resume=True).resumed_shards == 2
    assert tree(place.out) == whole and place.is_clean


def test_a_restoration_is_resumed_too(place: Place, converted: Path, restored: Whole) -> None:
    finished = place.killed(restore)
    assert restore(converted, place.out, resume=True).resumed_shards == finished
    assert tree(place.out) == restored and place.is_clean
    progress = Plain()
    assert restore(converted, place.out, resume=True, progress=progress).resumed_shards == 3
    assert any("already complete" in note for note in progress.notes)
    with pytest.raises(UsageError, match="exists"):
        restore(converted, place.out)
    with pytest.raises(UsageError, match="exists"):
        restore(converted, place.out, max_shard_size=1_000_000, resume=True)
    assert tree(place.out) == restored and place.is_clean


def test_a_complete_output_is_found_complete(place: Place, whole: Whole) -> None:
    repack(place.model, place.out)
    progress, again = Plain(), Inline()
    report = repack(place.model, place.out, resume=True, progress=progress, executor=again)
    assert report.resumed_shards == 3 and again.wrote == []
    assert any("already complete" in note for note in progress.notes)
    assert tree(place.out) == whole and place.is_clean


def test_a_damaged_output_is_not_found_complete(place: Place) -> None:
    repack(place.model, place.out)
    flip(place.out / "model-00002-of-00003.safetensors")
    with pytest.raises(VerificationError, match=r"tensor model\.layers"):
        repack(place.model, place.out, resume=True)


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_an_output_of_an_older_source_is_not_found_complete(place: Place, file: str) -> None:
    repack(place.model, place.out)
    before = tree(place.out)
    flip(place.model / file)
    with pytest.raises(UsageError, match=r"source has changed.*--overwrite"):
        repack(place.model, place.out, resume=True)
    assert tree(place.out) == before
    repack(place.model, place.out, overwrite=True)
    assert api.verify(place.out, against=place.model, workers=1).against is not None


@pytest.mark.parametrize("journal", [None, b"", b'{"type":"begin"', b"\xff\n", b"5\n", b"{}\n"])
def test_other_options_never_replace_a_complete_output(
    place: Place, whole: Whole, journal: bytes | None
) -> None:
    """Not even beside a partial output that no longer says what it is."""
    repack(place.model, place.out)
    if journal is not None:
        place.partial.mkdir()
        place.journal.write_bytes(journal)
    for asked in (options(target="cuda"), options(max_shard_size=20_000)):
        for flags in ({"resume": True}, {}):
            with pytest.raises(UsageError, match="--overwrite"):
                repack(place.model, place.out, asked=asked, **flags)
    assert tree(place.out) == whole
    assert repack(place.model, place.out, resume=True).resumed_shards == 3
    assert tree(place.out) == whole and place.is_clean


def test_other_options_take_nothing_over(place: Place, whole: Whole) -> None:
    place.killed()
    before = tree(place.partial)
    for asked in (options(target="cuda"), options(max_shard_size=20_000), options(fuse=True)):
        with pytest.raises(UsageError, match=r"other options.*--overwrite"):
            repack(place.model, place.out, asked=asked, resume=True)
    assert tree(place.partial) == before
    assert repack(place.model, place.out, overwrite=True).resumed_shards == 0
    assert tree(place.out) == whole and place.is_clean


@pytest.mark.parametrize("text", [b"", b"\n", b"{}\n", b"5\n", b"\xff\xff\n", b'{"type":"begin"'])
def test_a_journal_without_its_first_line_vouches_for_nothing(
    place: Place, whole: Whole, text: bytes
) -> None:
    """It does not say what the shards were made of, and neither does what is added to it."""
    place.killed()
    lines = place.journal.read_bytes().splitlines(keepends=True)
    place.journal.write_bytes(text + b"".join(lines[1:]))
    assert repack(place.model, place.out, resume=True).resumed_shards == 0
    assert tree(place.out) == whole and place.is_clean


def test_a_torn_line_loses_nothing_else(place: Place, whole: Whole) -> None:
    """What later runs add after it must still be found."""
    assert place.killed(after=4) == 1
    with place.journal.open("ab") as file:
        file.write(b'{"type":"shard","name":"model-00002')
    assert place.killed(after=4, resume=True) == 2
    with place.journal.open("ab") as file:
        file.write(b"\0\0\0")
    assert repack(place.model, place.out, resume=True).resumed_shards == 2
    assert tree(place.out) == whole


@pytest.mark.parametrize(
    "damage",
    [flip, lambda path: flip(path, 12), lambda path: os.truncate(path, 1000), Path.unlink],
    ids=["data", "header", "cut", "missing"],
)
def test_a_damaged_shard_is_made_again(
    place: Place, whole: Whole, damage: Callable[[Path], None]
) -> None:
    finished = place.killed()
    damage(place.built / place.finished()[0])
    assert repack(place.model, place.out, resume=True).resumed_shards == finished - 1
    assert tree(place.out) == whole


def test_a_leftover_empty_folder_is_no_hindrance(place: Place, whole: Whole) -> None:
    """As a kill leaves it before the journal exists, or at the very end."""
    for flags in ({}, {"resume": True}):
        place.partial.mkdir()
        repack(place.model, place.out, **flags)
        assert tree(place.out) == whole and place.is_clean
        place.partial.mkdir()
        repack(place.model, place.out, resume=True)
        assert place.is_clean
        shutil.rmtree(place.out)


# --- a source that changes -----------------------------------------------------------------------


@pytest.mark.parametrize("change", [flip, replaced_unseen, rewritten_unseen])
@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "tokenizer.json"])
def test_nothing_of_another_source_is_taken_over(
    place: Place, whole: Whole, file: str, change: Callable[[Path], None]
) -> None:
    place.killed()
    change(place.model / file)
    progress = Plain()
    report = repack(place.model, place.out, resume=True, progress=progress)
    assert report.resumed_shards == 0
    assert any("source has changed" in note for note in progress.notes)
    assert tree(place.out) != whole and place.is_clean
    assert api.verify(place.out, against=place.model, workers=1).against is not None
    clean = place.folder / "converted"
    repack(place.model, clean)
    assert tree(place.out) == tree(clean)


def test_nothing_of_another_config_is_taken_over(place: Place, whole: Whole) -> None:
    place.killed()
    config = place.model / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "OtherForCausalLM"))
    assert repack(place.model, place.out, resume=True).resumed_shards == 0
    changed = {name for name, digest in (tree(place.out) or {}).items() if whole[name] != digest}
    assert changed == {"config.json", "ctconvert.json"}


@pytest.mark.parametrize("change", [flip, replaced_unseen, rewritten_unseen, os.utime, Path.unlink])
@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "tokenizer.json"])
def test_a_source_that_changes_meanwhile_is_no_source(
    place: Place, file: str, change: Callable[[Path], None]
) -> None:
    """What was read before and after the change does not belong together."""
    with pytest.raises(ConversionError, match=file):
        repack(place.model, place.out, executor=Inline(lambda: change(place.model / file)))
    assert not place.out.exists()
    assert place.is_clean or change is Path.unlink  # it may come back as it was


@pytest.mark.parametrize("change", [flip, replaced_unseen, rewritten_unseen])
def test_a_source_that_changes_between_plan_and_run_is_no_source(
    place: Place, change: Callable[[Path], None]
) -> None:
    """Its headers were read, and its file may be open still: neither is what it is now."""
    store = LocalStore(place.model)
    plan = plan_of(store)
    change(place.model / "model-00001-of-00002.safetensors")
    with pytest.raises(ConversionError, match=r"model-00001-of-00002\.safetensors: changed"):
        build(plan, store, place.out, Settings(Inline(), Silent()))
    assert place.is_clean and not place.out.exists()


def test_a_converted_checkpoint_that_changes_meanwhile_is_not_restored(
    place: Place, converted: Path
) -> None:
    shard = converted / "model-00001-of-00003.safetensors"
    with pytest.raises(ConversionError, match="changed while"):
        restore(converted, place.out, executor=Inline(lambda: flip(shard)))
    assert place.is_clean and not place.out.exists()


def test_times_in_the_future_mean_nothing(place: Place, whole: Whole) -> None:
    for path in place.model.rglob("*"):
        os.utime(path, (2**32, 2**32))
    finished = place.killed()
    assert repack(place.model, place.out, resume=True).resumed_shards == finished
    assert tree(place.out) == whole


def test_damaged_data_leaves_nothing(place: Place) -> None:
    """Only another source helps, so that nothing of it is worth keeping."""
    store = LocalStore(place.model)
    scale = plan_of(store).modules[3].sources[0].tensors["weight_scale"]
    with (place.model / scale.file).open("r+b") as file:
        file.seek(scale.offset)
        file.write(b"\x80\x7f")  # infinity in BF16
    before = faults.descriptors()
    for _ in range(3):
        with pytest.raises(BadInputError, match=rf"{module_name(3)}.*inf"):
            repack(place.model, place.out)
        assert place.is_clean and not place.out.exists()
    store.close()
    assert faults.descriptors() <= before


# --- names of files ------------------------------------------------------------------------------

NAMES = [
    "config.json.partial",
    "model.safetensors.partial",
    "old",
    "checkpoint",
    "journal.jsonl",
    "out.partial/journal.jsonl",
    "deep/er/file.txt",
    "a name with spaces",
    "naïve.txt",
]


def test_side_files_of_any_name_are_carried_along(place: Place) -> None:
    for name in NAMES:
        path = place.model / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    place.killed()
    repack(place.model, place.out, resume=True)
    restore(place.out, place.folder / "converted")
    for folder in (place.out, place.folder / "converted"):
        for name in NAMES:
            assert (folder / name).read_text() == name
    api.verify(place.out, against=place.model, workers=1)
    repack(place.model, place.out, overwrite=True, asked=options(max_shard_size=1_000_000))
    assert place.is_clean


# --- replaced in two steps -----------------------------------------------------------------------


def moved_aside(place: Place) -> Whole | None:
    """As a kill between two renames leaves it, where directories cannot be exchanged."""
    another_conversion(place.out)
    old = tree(place.out)
    place.killed(overwrite=True)
    place.out.rename(place.partial / "old")
    return old


def by_verify(place: Place) -> None:
    api.verify(place.out, workers=1)


def by_restore(place: Place) -> None:
    api.restore(place.out, place.folder / "converted", workers=1)


def by_load(place: Place) -> None:
    assert len(Loader(place.out, "cpu").converted) == 6


def by_a_link(place: Place) -> None:
    link = place.folder / "converted"
    link.symlink_to("out")
    api.verify(link, workers=1)


def by_a_refused_repack(place: Place) -> None:
    for flags in ({}, {"resume": True}):
        with pytest.raises(UsageError):
            repack(place.model, place.out, asked=options(target="cuda"), **flags)


@pytest.mark.parametrize(
    "verb", [by_verify, by_restore, by_load, by_a_link, by_a_refused_repack, lambda place: None]
)
def test_whatever_runs_next_brings_an_output_back(
    place: Place, whole: Whole, verb: Callable[[Place], None]
) -> None:
    old = moved_aside(place)
    verb(place)
    if place.out.exists():
        assert tree(place.out) == old
        api.verify(place.out, against=place.model, workers=1)
    repack(place.model, place.out, resume=True)
    assert tree(place.out) == whole and place.is_clean


def test_nothing_is_brought_back_into_the_place_of_something_else(place: Place) -> None:
    moved_aside(place)
    place.out.mkdir()
    (place.out / "notes.txt").write_text("mine")
    recover(place.out)
    assert [path.name for path in place.out.iterdir()] == ["notes.txt"]
    assert (place.partial / "old" / "ctconvert.json").exists()


def test_a_commit_is_recorded_before_out_appears(place: Place) -> None:
    with pytest.raises(ConversionError, match="left alone"):
        repack(place.model, place.out, executor=Inline(lambda: a_folder(place.out)))
    assert isinstance(read_journal(place.journal)[-1], Commit)


# --- two at once ---------------------------------------------------------------------------------


def test_two_runs_at_once(place: Place, whole: Whole) -> None:
    """The second is refused whatever it is told, and the first is not disturbed."""

    def second() -> None:
        for flags in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match=r"out\.partial is being written by another run"):
                repack(place.model, place.out, **flags)
        recover(place.out)

    repack(place.model, place.out, executor=Inline(second))
    assert tree(place.out) == whole and place.is_clean


def test_out_is_not_brought_back_under_a_run_that_is_replacing_it(place: Place) -> None:
    another_conversion(place.out)

    def look() -> None:
        place.out.rename(place.partial / "old")
        recover(place.out)
        assert not place.out.exists()
        (place.partial / "old").rename(place.out)

    repack(place.model, place.out, executor=Inline(look), overwrite=True)


def test_the_journal_of_another_run_is_not_mistaken_for_the_one_that_was_seen(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a first look and the lock another run came, of another source, and was killed."""
    from ctconvert.work import staging

    other = place.folder / "converted"
    shutil.copytree(place.model, other)
    flip(other / "model-00001-of-00002.safetensors")
    place.killed()
    lock, came = staging.fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not came:
            came.append(True)
            ended = faults.run(
                lambda: repack(
                    other,
                    place.out,
                    overwrite=True,
                    executor=Inline(lambda: os.kill(os.getpid(), signal.SIGKILL), 6),
                )
            )
            assert ended.end == "killed"
        lock(descriptor, operation)

    monkeypatch.setattr(staging.fcntl, "flock", late)
    assert repack(place.model, place.out, resume=True).resumed_shards == 0
    api.verify(place.out, against=place.model, workers=1)
