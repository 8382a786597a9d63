"""For all tests: one thread for each process, two rings, and signals as a script finds them.

    python -m pytest             the quick ring: what shows that the code is right
    python -m pytest -m slow     the slow ring: compilers, kills by the dozen, whole products
    python -m pytest --all       both
"""

import os
import signal

import pytest

# The tests are many and small: two threads would spend their time waiting for each other. To be
# set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

QUICK = "not slow"  # what pytest.ini chooses
pytest.register_assert_rewrite("helpers")  # so that its asserts say what they saw


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the slow ring, too")


def pytest_configure(config):
    by_name = config.args and all("::" in arg for arg in config.args)
    if (config.option.all or by_name) and config.option.markexpr == QUICK:
        config.option.markexpr = ""


def pytest_report_header(config):
    if config.option.markexpr == QUICK:
        return "the quick ring: --all adds the slow one"


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder with toy data and a model that train.py made of it, data/toy and out/toy: to be
    copied."""
    import torch
    from helpers import TOY, run

    home = tmp_path_factory.mktemp("toy")
    run(home, "prepare", "--toy", "--stories", 300)
    run(home, "train", *TOY.split())
    torch.set_flush_denormal(False)
    return home


@pytest.fixture(scope="session")
def forks():
    """Calls a function in a process of its own: helpers.Forks."""
    if not hasattr(os, "fork"):
        pytest.skip("forks")
    from helpers import Forks

    forks = Forks()
    yield forks
    forks.end()


@pytest.fixture(autouse=True)
def as_a_script_finds_it():
    """All signals interrupt, also where the tests run as a shell's background job, which ignores
    Ctrl-C. What a script sets for its own process changes the last bits of sums, and is reset."""
    import torch

    signals = [s for s in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, s)]
    before = {getattr(signal, s): signal.signal(getattr(signal, s), signal.default_int_handler)
              for s in signals}
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)
    torch.set_flush_denormal(False)
    for s, handler in before.items():
        signal.signal(s, handler)
