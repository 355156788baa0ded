"""Real hosts for these tests: on CI they must be there, elsewhere tests are skipped with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.hosts import Hosts, NoHostsError


def made(count: int) -> Hosts:
    try:
        return Hosts(count)
    except NoHostsError as error:
        reason = f"no hosts can be made here: {error} (root, openssh-server, pdsh, iproute2)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def two() -> Iterator[Hosts]:
    hosts = made(2)
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def three() -> Iterator[Hosts]:
    hosts = made(3)
    yield hosts
    hosts.close()
