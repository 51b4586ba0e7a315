"""The NumPy module of the raw kernels: plain, or with ``--sanitized`` the one that test_sanitizers.py has built."""

from collections.abc import Iterator
from types import ModuleType

import native
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sanitized", action="store_true", help="test the kernels built with ASan and UBSan")


@pytest.fixture(scope="session")
def module(request: pytest.FixtureRequest) -> ModuleType:
    return native.load(native.build(request.config.getoption("--sanitized", default=False)))


@pytest.fixture(params=native.LEVELS)
def kernels(request: pytest.FixtureRequest, module: ModuleType) -> native.Kernels:
    if request.param not in module.levels():
        pytest.skip(f"this CPU cannot run {request.param}")
    return native.Kernels(module, request.param)


@pytest.fixture(autouse=True)
def threads(module: ModuleType) -> Iterator[None]:
    """Three threads unless the test says otherwise: pieces of unequal size."""
    module.set_num_threads(3)
    yield
    module.set_num_threads(1)
