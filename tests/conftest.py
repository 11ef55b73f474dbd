"""Two threads in all, deterministic algorithms and no network for every test."""
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))
