"""One thread and no network for every test."""
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)          # small networks on a busy machine crawl with more; test_parity takes two
