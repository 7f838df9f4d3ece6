"""For tests that start ranks: forked from a server with the same shape checks as the suite."""

import cloudpickle
import pytest

from minillm.parallel.forkserver import preload

preload("shapes")


@pytest.fixture(autouse=True, scope="module")
def functions_travel_by_value(request):
    """Else every rank would import the test module, and pytest with it."""
    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)
