"""One thread and no network for every test."""
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)          # small networks on a busy machine crawl with more


@pytest.fixture(scope="module")
def two_threads():
    "For tests of networks at full size."
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)
