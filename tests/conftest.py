"""One thread, no luck and no cache: every test computes the same numbers on every run."""

import os

import torch
from hypothesis import settings

os.environ["NOPE_CACHE_DIR"] = ""
torch.set_num_threads(1)
settings.register_profile("default", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("default")
