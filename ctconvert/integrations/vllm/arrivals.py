"""What of a layer has been loaded: vLLM's loaders pass over tensors that never come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from blake3 import blake3
from vllm.model_executor import utils

from ctconvert.errors import VerificationError
from ctconvert.store.safetensors import TensorEntry
from ctconvert.transforms.dtypes import raw_bytes, torch_dtype

#: A tensor's local name, and which of the layer's parts it is of.
Key = tuple[str, int]
_LETTERS = {"q": 0, "k": 1, "v": 2}


class Arrivals:
    """The tensors that a layer must get, and those that came.

    ``hashes`` are BLAKE3 by full name, of those whose bytes are compared.
    """

    def __init__(self, expected: Mapping[Key, TensorEntry], hashes: Mapping[str, str]) -> None:
        self.expected, self.hashes = dict(expected), hashes
        self.came: set[Key] = set()

    def check(self, key: Key, tensor: torch.Tensor) -> None:
        """Notes a tensor, which must be the one that the manifest names.

        Raises:
            VerificationError: it is none of the layer's, or of another shape, dtype or hash.
        """
        entry = self.expected.get(key)
        if entry is None:
            local, part = key
            raise VerificationError(
                f"a tensor {local} for part {part} of {self.name}, which has none in the manifest"
            )
        if tuple(tensor.shape) != entry.spec.shape or tensor.dtype != torch_dtype(entry.spec.dtype):
            raise VerificationError(
                f"tensor {entry.name}: {tensor.dtype} {list(tensor.shape)} in the checkpoint, "
                f"{entry.spec} in the manifest; convert again, or `ctconvert verify` it"
            )
        if (wanted := self.hashes.get(entry.name)) is not None:
            data = raw_bytes(tensor.cpu().contiguous())
            if blake3(data).hexdigest() != wanted:
                raise VerificationError(
                    f"tensor {entry.name}: damaged: its hash is not the manifest's"
                )
        self.came.add(key)

    @property
    def name(self) -> str:
        """Of a module among them, for messages."""
        return next(iter(self.expected.values())).name.rpartition(".")[0]

    def all_came(self) -> None:
        """Raises VerificationError for the first tensor that did not come."""
        if loaded_elsewhere():
            return
        for key, entry in self.expected.items():
            if key not in self.came:
                raise VerificationError(
                    f"tensor {entry.name}: vLLM loaded nothing for it; the checkpoint lacks it, or "
                    "vLLM's model has no such name"
                )


def loaded_elsewhere() -> bool:
    """Whether the weights are another process's, as they lay there after loading.

    vLLM's weight cache maps them in; versions that have none have no such mark.
    """
    return bool(getattr(utils, "is_weights_pre_processed", bool)())


def part_of(shard: Any) -> int:
    """Which part of a joined layer a shard id of vLLM's means; 0 where there is none.

    Raises:
        VerificationError: it means several.
    """
    if shard is None:
        return 0
    if isinstance(shard, int):
        return shard
    if shard in _LETTERS:
        return _LETTERS[shard]
    raise VerificationError(f"shard {shard!r} of a joined layer: this plugin knows no such parts")


def noting(arrivals: Arrivals, local: str, load: Callable[..., Any] | None) -> Callable[..., None]:
    """A weight loader that notes the tensor and hands it to ``load``.

    With no ``load`` the parameter is the whole tensor. Parts that come to one place must be equal.
    """

    def loader(param: torch.nn.Parameter, tensor: torch.Tensor, *shard: Any, **more: Any) -> None:
        given = shard[0] if shard else more.get("loaded_shard_id")
        key = (local, part_of(given))
        again = any(name == local for name, _ in arrivals.came - {key})
        arrivals.check(key, tensor)
        if load is not None:
            load(param, tensor, *shard, **more)
        elif not again:
            param.data.copy_(tensor)
        elif not torch.equal(param.data, tensor.to(param.device)):
            raise VerificationError(
                f"tensor {arrivals.expected[key].name}: differs from that of the parts joined with "
                "it, and their kernel takes one"
            )

    return loader
