"""A pytest plugin: with SHARD=i/n it keeps every n-th test, starting with the i-th."""

import os

import pytest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    number, count = map(int, os.environ["SHARD"].split("/"))
    config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place % count != number])
    items[:] = items[number::count]
