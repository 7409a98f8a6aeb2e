"""Fixtures shared by all tests, tiny real models; and the order in which files of tests run."""

from __future__ import annotations

import os

# Before anything imports the libraries that read these.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one test process for each core is enough threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import tiny

pytest_plugins = ["hub_clients"]


LONG = [
    *("stack_families", "docs", "fitted", "streaming", "expressions", "crash", "families"),
    *("every_family", "forward", "hostile", "kernels", "cli", "quickstart", "ranks", "scenarios"),
    *("methods", "prompting", "eval", "remote", "lock", "build_report"),
]
"""Files that take long, the longest first: begun last, one would keep a single core busy."""


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist's own order is by the number of tests


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A maker of tiny checkpoints: `models("llama", seed=1, num_hidden_layers=3)` -> folder.

    For each file its own, so that no file meets what another did to a checkpoint.
    """
    return tiny.Maker(tmp_path_factory.mktemp("models"))


@pytest.fixture
def llamas(models):
    """Folders of three llamas of one shape with a tokenizer, as after fine-tuning one base."""
    return [models("llama", seed=seed) for seed in (1, 2, 3)]
