"""Makes ``from_pretrained`` of transformers load converted checkpoints, kernels in place.

Importing this is all it takes: it registers a quantizer under ``ctconvert``, the ``quant_method``
of a converted checkpoint's config.json. Without it transformers warns of an unknown method and
returns random weights.
"""

from __future__ import annotations

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.18"):
    raise ImportError(f"ctconvert needs transformers 5.18 or newer, not {transformers.__version__}")

from ctconvert.integrations.transformers.quantizer import CtconvertConfig, CtconvertQuantizer

__all__ = ["CtconvertConfig", "CtconvertQuantizer"]
