"""One thread and no luck: every test computes the same numbers on every run."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("default", derandomize=True, deadline=None, max_examples=40)
settings.load_profile("default")
