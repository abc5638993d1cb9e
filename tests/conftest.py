"""One thread, no luck and no cache: every test computes the same numbers on every run.

The Hypothesis profile `nightly` draws other examples each time, and many more; `planted` stops at
the first that fails, which `tests.planted` need not see shrunk.  What a test records as its
`summary` is told at the end, though it passed.
"""

import os

import torch
from hypothesis import Phase, settings

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"  # of the test processes, which are started after this
os.environ["NOPE_CACHE_DIR"] = ""
torch.set_num_threads(1)
settings.register_profile("fast", derandomize=True, deadline=None, max_examples=40)
settings.register_profile(
    "planted", settings.get_profile("fast"), phases=(Phase.explicit, Phase.generate)
)
settings.register_profile("nightly", deadline=None, max_examples=250, print_blob=True)
settings.load_profile("fast")  # `pytest --hypothesis-profile=nightly` loads the other afterwards


def pytest_terminal_summary(terminalreporter):
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, told in report.user_properties:
                if name == "summary":
                    terminalreporter.write_line(told)
