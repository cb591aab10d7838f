"""The cluster of these tests: it starts once, at its first use."""

from collections.abc import Iterator

import pytest
from two_nodes import TwoNodes, two_nodes


@pytest.fixture(scope="session")
def cluster() -> Iterator[TwoNodes]:
    """Two nodes of two CPUs each."""
    with two_nodes(namespaces=True) as running:
        yield running
