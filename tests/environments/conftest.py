"""A local web for the tests of the web tools."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import web_fakes
from web_fakes import Web


@pytest.fixture(scope="module")
def server() -> Iterator[Web]:
    with web_fakes.serve() as web:
        yield web


@pytest.fixture
def web(server: Web) -> Web:
    """The module's server, emptied."""
    server.pages.clear()
    server.heard.clear()
    return server
