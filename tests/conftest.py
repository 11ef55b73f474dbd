"""One thread and no network for every test."""
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)          # small networks on a busy machine crawl with more

settings.register_profile("fixed", derandomize=True, deadline=None)      # the same examples on every machine: a red build is a change of ours
settings.register_profile("fuzz", deadline=None)                         # HYPOTHESIS_PROFILE=fuzz looks for new ones
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(scope="module")
def two_threads():
    "For tests of networks at full size."
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    "An empty hub cache, and a network that must not be asked."
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("FAR_NB_WEIGHTS", raising=False)
    monkeypatch.setattr("socket.socket.connect", lambda *a, **k: pytest.fail("tried the network"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    "What tests keep of shards stays theirs."
    os.environ["FAR_NB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
