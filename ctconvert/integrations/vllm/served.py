"""The checkpoint that is served: what its manifest says of each module, by vLLM's names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ctconvert.errors import UsageError, VerificationError
from ctconvert.output import Output
from ctconvert.records import Convert, Manifest
from ctconvert.store.answers import hub_failures
from ctconvert.store.checkpoint import MANIFEST

#: Ends the names of tensors that only the way back to the source needs.
UNREAD = ("_source", "_lost")
#: Set to 1 in the environment, has every converted tensor hashed as it comes.
VERIFY = "CTCONVERT_VERIFY"


class Served:
    """A converted checkpoint, checked: its manifest, files, headers, layouts and their versions.

    Args:
        model: a directory, or a Hub id, of which only the manifest is there yet.
        revision: of the Hub repository.

    Raises:
        UsageError: it cannot be reached, or is a restored checkpoint.
        VerificationError: it is damaged, or made by another version of this package.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        self.model, self.revision = model, revision
        manifest = _manifest(model, revision)
        self.plan = manifest.plan
        #: BLAKE3 hashes of the tensors, where they are to be compared as they come.
        self.hashes = manifest.tensors if os.environ.get(VERIFY) == "1" else {}
        if self.plan.kind != "converted":
            raise UsageError(f"{model}: a restored checkpoint, which vLLM loads without ctconvert")
        self.ranks = self.plan.options.tensor_parallel
        self.rank: int | None = None
        self.modules = {module.name: module for module in self.plan.modules}
        for module in self.plan.modules:
            _check_layout(module)

    def __reduce__(self) -> tuple[type[Served], tuple[str, str | None]]:
        """Other processes open it again: a large model's manifest is not sent to them."""
        return Served, (self.model, self.revision)

    def of_rank(self, rank: int, ranks: int) -> None:
        """Keeps the modules that one of vLLM's ranks has, under the names of whole ones.

        Raises:
            UsageError: the checkpoint is cut for another number of ranks.
        """
        if self.ranks == 1 or self.rank is not None:
            return  # what is not cut vLLM cuts
        if ranks != self.ranks:
            raise UsageError(
                f"{self.model}: cut for {self.ranks} ranks, and vLLM has {ranks}: use "
                f"--tensor-parallel-size {self.ranks}, or convert again with --tensor-parallel"
            )
        self.rank = rank
        mine = [module for module in self.plan.modules if module.rank in (None, rank)]
        self.modules = {module.place: module for module in mine}

    def rename(self, names: Callable[[list[str]], list[str]]) -> None:
        """Takes the modules by other names, as a model of vLLM's calls them.

        Raises:
            VerificationError: two modules get one name.
        """
        renamed: dict[str, Convert] = {}
        for name, module in self.modules.items():
            new = next(iter(names([name])), name)
            if new in renamed:
                raise VerificationError(
                    f"module {module.name}: vLLM has one name, {new}, for it and "
                    f"{renamed[new].name}"
                )
            renamed[new] = module
        self.modules = renamed

    def parts(self, prefix: str, joined: Sequence[str]) -> list[Convert]:
        """The converted modules that a layer of vLLM's is made of, in order; none if it is not.

        Args:
            prefix: the layer's name.
            joined: last names of the modules that vLLM joins under it, empty for no joint.

        Raises:
            VerificationError: some of its parts are converted and some are not.
        """
        if prefix in self.modules:
            return [self.modules[prefix]]
        parent, dot, _ = prefix.rpartition(".")
        names = [f"{parent}{dot}{leaf}" for leaf in joined]
        found = [self.modules[name] for name in names if name in self.modules]
        if found and len(found) != len(names):
            missing = next(name for name in names if name not in self.modules)
            raise VerificationError(
                f"module {prefix}: vLLM joins {', '.join(joined)}, and {missing} is not converted "
                "as the others are; convert with all of them, or none (--exclude)"
            )
        return found


def _manifest(model: str, revision: str | None) -> Manifest:
    if Path(model).is_dir():
        return Output.open(model).manifest
    from huggingface_hub import hf_hub_download

    with hub_failures(f"{model}@{revision}" if revision else model):
        path = Path(hf_hub_download(model, MANIFEST, revision=revision))
    return Manifest.parse(path.read_bytes(), f"{model}/{MANIFEST}")


def _check_layout(module: Convert) -> None:
    from ctconvert.runtime.loading import binding

    binding(module)
