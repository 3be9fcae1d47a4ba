"""A pytest plugin: of the tests that are chosen, every ``n``-th from the ``i``-th on, where SHARD is ``i/n``."""

import os

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = map(int, os.environ["SHARD"].split("/"))
    config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place % count != number])
    items[:] = items[number::count]
