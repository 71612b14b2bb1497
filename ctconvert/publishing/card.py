"""The model card of a converted checkpoint: a part that is written anew, beside what people wrote.

Source of the metadata: the Hub's documentation, huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import yaml

from ctconvert.errors import UsageError
from ctconvert.records import Manifest

_BEGIN = "<!-- ctconvert: every push writes this part again -->"
_END = "<!-- end of what ctconvert wrote -->"
#: What a derived model takes over of its source's metadata.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def model_card(manifest: Manifest, repo: str, written: str | None, source: str | None) -> str:
    """The text of README.md.

    Metadata that a person wrote stays as it is, but what an earlier push wrote; tags are joined.

    Args:
        manifest: of a converted checkpoint.
        repo: where it will be.
        written: the card that is there, or that a person wrote for it.
        source: the source's card.

    Raises:
        UsageError: the metadata of a card cannot be read.
    """
    card = _parsed(written or "", f"README.md of {repo}")
    origin = _parsed(source or "", "README.md of the source")
    before, body = card.data.to_dict(), card.text
    begin, found, rest = body.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if found and not ended:
        raise UsageError(
            f"README.md of {repo}: it has no line {_END!r}; add it, or remove {_BEGIN!r}"
        )
    data, plan = card.data, manifest.plan
    ours: dict[str, Any] = {
        "base_model": plan.source.id if plan.source.revision else origin.data.get("base_model"),
        "library_name": "ctconvert",
    }
    if ours["base_model"] is not None:
        ours["base_model_relation"] = "quantized"
    for key, value in ours.items():
        if found or data.get(key) is None:
            data[key] = value
    for key in _INHERITED:
        if data.get(key) is None and origin.data.get(key) is not None:
            data[key] = origin.data[key]
    tags = ["ctconvert", "compressed-tensors", plan.options.target, *plan.layouts()]
    data["tags"] = list(dict.fromkeys([*(data.get("tags") or []), *tags]))
    part = f"{_BEGIN}\n{_about(manifest, repo)}\n{_END}"
    card.text = f"{begin}{part}{after}" if found else "\n".join(filter(None, (part, body)))
    if written and data.to_dict() == before:  # its very bytes, comments too
        return written.removesuffix(body) + str(card.text)
    return str(card)


def _parsed(text: str, where: str) -> Any:
    from huggingface_hub import ModelCard

    if not text.lstrip().startswith("---"):
        text = f"---\n{{}}\n---\n{text}"
    try:
        return ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"{where}: its metadata cannot be read: {first}") from None


def _about(manifest: Manifest, repo: str) -> str:
    """What it is, how to check, load and serve it."""
    plan, tool = manifest.plan, manifest.tool
    source = plan.source
    base, against = f"`{source.id}`", ""
    if source.revision:
        base = f"[{source.id}](https://huggingface.co/{source.id}) at commit `{source.revision}`"
        against = f" --against {source.id}@{source.revision}"
    counts = Counter(
        (module.recipe.layout, module.recipe.weight.format, module.recipe.weight.label)
        for module in plan.modules
    )
    rows = [
        f"| {count} | {form} {weights} | `{layout}` |"
        for (layout, form, weights), count in counts.items()
    ]
    options = ""
    load = f"""
Load it in transformers (`pip install 'ctconvert[transformers]'`):

```python
import ctconvert.integrations.transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo}")
```
"""
    if plan.options.tensor_parallel > 1:  # which transformers does not load
        load, options = "", f" --tensor-parallel-size {plan.options.tensor_parallel}"
        options += " --enable-expert-parallel" if plan.options.expert_parallel else ""
    kept = f" {len(plan.kept)} quantised modules are as they were." if plan.kept else ""
    return f"""
# {repo.rpartition("/")[2]}

{base}, converted by ctconvert {tool.version} for the kernels of its target
`{plan.options.target}`: the same codes and scales, bit for bit, in the order in which they read.

| modules | weights | became |
|---|---|---|
{chr(10).join(rows)}

{len(plan.copies)} other tensors are copied unchanged.{kept}

**Plain transformers cannot read it**: it knows no such `quant_method`, and gives random weights.

Verify it:

```sh
pip install ctconvert
ctconvert verify {repo}{against}
```
{load}
Serve it by vLLM (`pip install 'ctconvert[vllm]'`), or turn it back into what it was made from:

```sh
vllm serve {repo}{options}
ctconvert restore {repo} restored
```
"""
