"""What a caller asked for: options from arguments, and how planning runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ctconvert.errors import UsageError
from ctconvert.planning.choose import check_options, dtype_named
from ctconvert.records import Options


def options_of(
    target: str,
    fuse: bool,
    keep_unsupported: bool,
    include: Sequence[str],
    exclude: Sequence[str],
    layout: Mapping[str, str] | None,
    max_shard_size: int,
    dtype: str | None,
    tensor_parallel: int,
    expert_parallel: bool,
) -> Options:
    """The options of a conversion, from the arguments of :func:`ctconvert.api.plan`.

    Raises:
        UsageError: there is no such target or layout, or a value is out of range.
    """
    check_shard_size(max_shard_size)
    options = Options(
        target=target,
        dtype=dtype_named(dtype),
        fuse=fuse,
        keep_unsupported=keep_unsupported,
        include=tuple(include),
        exclude=tuple(exclude),
        overrides=tuple((layout or {}).items()),
        max_shard_size=max_shard_size,
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
    )
    check_options(options)
    return options


def check_shard_size(size: int) -> None:
    """Raises UsageError where no file can be that large."""
    if not 1 <= size < 2**63:
        raise UsageError(f"max_shard_size {size}: it must be positive, and in 64 bits")


@contextmanager
def no_collection() -> Iterator[None]:
    """Plans without the garbage collector: hundreds of thousands of records, no cycle in them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
