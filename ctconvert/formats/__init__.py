"""The source formats. To add one: a file here and a line in :data:`FORMATS`."""

from __future__ import annotations

from ctconvert.formats.base import Format, ModuleTensors
from ctconvert.formats.mxfp4 import MXFP4Packed
from ctconvert.formats.mxfp8 import MXFP8Quantized
from ctconvert.formats.nvfp4 import NVFP4Packed
from ctconvert.formats.pack_quantized import PackQuantized
from ctconvert.formats.quantized import FloatQuantized, IntQuantized, NaiveQuantized
from ctconvert.formats.sparse24_bitmask import Sparse24Bitmask

#: Every format that can be read, by compressed-tensors' name.
FORMATS: tuple[Format, ...] = (
    PackQuantized(),
    IntQuantized(),
    FloatQuantized(),
    NaiveQuantized(),
    MXFP4Packed(),
    NVFP4Packed(),
    MXFP8Quantized(),
    Sparse24Bitmask(),
)

#: compressed-tensors formats that are known and not read, with the reason.
UNREAD: dict[str, str] = {
    "dense": "format dense holds unquantised weights beside scales; nothing to repack (save it "
    "again with save_compressed=True)",
    "sparse-bitmask": "format sparse-bitmask is unstructured sparsity, which no kernel layout "
    "takes",
    "marlin-24": "format marlin-24 is already a kernel layout, of a kernel that no longer exists",
    "mxfp6-pack-quantized": "no layout takes MXFP6 yet",
}

__all__ = ["FORMATS", "UNREAD", "Format", "ModuleTensors", "get"]


def get(name: str) -> Format | None:
    """The format of that name, or None where it is not read."""
    return next((item for item in FORMATS if item.name == name), None)
