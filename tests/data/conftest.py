"""Every test of the data room has an index cache of its own."""

import pytest


@pytest.fixture(autouse=True)
def index_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MSN_CACHE_DIR", str(folder))
    return folder
