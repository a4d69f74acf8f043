"""Settings and fixtures for all tests."""
import os

import hypothesis
import jax
import pytest

# Few examples, since each may compile; in CI always the same ones, so that a failure can be repeated.
hypothesis.settings.register_profile("pcnb", deadline=None, max_examples=25, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("pcnb")


def pytest_sessionstart(session):
    # (n,) + (m, n) is refused: in code written for one example and mapped over the batch it is a mistake.
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def getkey():
    "A function that returns a new random key at each call, the same ones in every run. With hypothesis, draw a seed instead."
    key = jax.random.key(0)

    def new_key():
        nonlocal key
        key, out = jax.random.split(key)
        return out

    return new_key


@pytest.fixture
def x64():
    "Runs the test in double precision, for comparisons with closed forms and finite differences."
    with jax.enable_x64(True):
        yield
