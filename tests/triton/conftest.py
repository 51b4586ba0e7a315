"""The binaries of every kernel, compiled once for all tests that read them."""

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def binaries():
    """By target."""
    from widenet_kernels.triton import report
    from widenet_kernels.triton.binaries import TARGETS

    targets = list(TARGETS)
    return dict(zip(targets, report.compile_for(targets), strict=True))
