"""``ctconvert.json``, the manifest: what was made from what, with a hash of every tensor.

Schema, version 1 (all hashes are SHA-256 in hexadecimal)::

    format_version   1
    tool             {name, version}
    target           the target the layouts were chosen for
    options          {fuse, keep_unsupported}
    plan             hash of all that decides the output's bytes but the source's data
    source           {id, revision, files: [{name, size, sha256}]}; revision is a Hub commit or null
    modules          by name: {
                       format, scheme, weights (for people), activations,
                       layout, layout_version, shape [N, K], bits, group_size, symmetric,
                       experts (leading size of 3-D tensors, or null),
                       parts: [{name, rows, tensors: {local: {dtype, shape}},
                                values: {local: hex}, beside: {local: {dtype, shape}}}],
                       details: {view, padded_shape, ...}, notes,
                       tensors: {full name: {dtype, shape, file, sha256}} }
    kept             modules copied unchanged because no layout takes them: {name: reason}
    tensors          tensors copied unchanged: {full name: {dtype, shape, file, sha256}}
    files            every other byte: {name: {size, sha256}}; for a safetensors file the hash is
                     of its header, the tensors' own hashes covering the rest
    notes            lines of the report
    manifest_sha256  hash of this file with this value replaced by 64 zeros

``parts`` hold what :func:`ctconvert.restore` needs: the source's tensors and the raw bytes of the
few-element ones (``values``). Nothing in it depends on time or place: one source and one set of
options give one manifest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ctconvert.errors import VerificationError

NAME = "ctconvert.json"
FORMAT_VERSION = 1
_BLANK = "0" * 64


def dump(manifest: dict[str, Any]) -> bytes:
    """The file's bytes, its own hash filled in."""
    blank = json.dumps(manifest | {"manifest_sha256": _BLANK}, indent=1) + "\n"
    digest = hashlib.sha256(blank.encode()).hexdigest()
    return blank.replace(
        f'"manifest_sha256": "{_BLANK}"', f'"manifest_sha256": "{digest}"'
    ).encode()


def load(folder: Path) -> dict[str, Any]:
    """Reads and checks the manifest of an output directory.

    Raises:
        VerificationError: it is missing, damaged, or of a version this program does not know.
    """
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise VerificationError(
            f"{folder}: no {NAME}, so this is no complete ctconvert checkpoint"
        ) from None
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{path}: damaged: not valid JSON ({error})") from None
    digest = manifest.get("manifest_sha256") if isinstance(manifest, dict) else None
    blank = data.replace(str(digest).encode(), _BLANK.encode())
    if not isinstance(digest, str) or hashlib.sha256(blank).hexdigest() != digest:
        raise VerificationError(f"{path}: damaged: its contents do not match its own hash")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise VerificationError(
            f"{path}: format_version {manifest.get('format_version')}, and this program reads "
            f"{FORMAT_VERSION}; use the ctconvert that wrote it"
        )
    return manifest
