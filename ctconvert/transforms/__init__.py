"""Bit-exact transforms between checkpoint formats and kernel layouts.

Each transform has a torch path (``cpu.py`` of its package) and Triton kernels (``triton.py``) whose
results are equal bit for bit; :mod:`ctconvert.transforms.dispatch` says which one a tensor takes.
:mod:`ctconvert.transforms.shapes` has the sizes, without torch.
"""
