"""What the tests of integrations share."""

import pytest
from dense_models import KINDS


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """A kind of dense model; those of transformers where it is installed."""
    if request.param != "encoder":
        pytest.importorskip("transformers", minversion="5.0")
    return request.param
