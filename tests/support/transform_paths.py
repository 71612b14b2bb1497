"""Fixtures of the tests here, a plugin of each module that names it in ``pytest_plugins``."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["torch", "triton"])
def either_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths on the CPU: the kernels run in Triton's interpreter."""
    if request.param == "triton":
        triton = pytest.importorskip("triton")
        if not triton.knobs.runtime.interpret:
            pytest.skip("needs Triton's interpreter")
        from ctconvert.transforms import recode, reorder

        monkeypatch.setattr(reorder, "has_kernels", lambda tensor: True)
        monkeypatch.setattr(recode, "has_kernels", lambda tensor: True)
    return request.param
