"""The requirements of an installed package, for ``pip install -r``, without those in ``LEFT_OUT``.

python requirements.py PACKAGE
"""

from __future__ import annotations

import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

#: Installed before, by themselves, or needed for images, sound and video alone.
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "numba", "xgrammar"}

for text in requires(sys.argv[1]) or ():
    requirement = Requirement(text)
    applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if applies and requirement.name not in LEFT_OUT:
        requirement.marker = None
        print(requirement)
