"""Fixtures: sites that are up, and that are checked when they go down."""

import contextlib

import pytest

from blackbox import healing
from blackbox.site import Site

EVERYTHING_UP = {"everything": "FROM /messages/* INTO $upstream"}


@contextlib.contextmanager
def running_site(folder, routes, **options):
    site = Site(folder, routes, **options)
    try:
        site.start_hub()
        yield site
    finally:
        site.close()


@pytest.fixture(scope="module")
def site(request, tmp_path_factory):
    """One site for all tests of a file. The file's ROUTES and SETTINGS say how it is set up."""
    routes = getattr(request.module, "ROUTES", EVERYTHING_UP)
    settings = getattr(request.module, "SETTINGS", {})
    with running_site(tmp_path_factory.mktemp("site"), routes, settings=settings) as made:
        yield made


@pytest.fixture
def make_site(tmp_path):
    """Makes a site for one test: `make_site(routes, settings=…)`."""
    with contextlib.ExitStack() as stack:

        def make(routes=None, **options):
            return stack.enter_context(running_site(tmp_path, routes or EVERYTHING_UP, **options))

        yield make


def pytest_terminal_summary(terminalreporter):
    if healing.ROWS:
        terminalreporter.section("from healing to the first settled message")
        for line in healing.table():
            terminalreporter.write_line(line)
