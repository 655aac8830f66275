"""The names of the package itself: each is there, none costs anything before it is used."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import generative

ROOT = Path(__file__).parent.parent
HOMES = {
    "GeometricBrownianMotion": "gbm_diffusion",
    "log_likelihood": "likelihood",
    "sample": "samplers",
    "train": "training",
}


def test_every_public_name_is_that_of_its_module():
    assert sorted(generative.__all__) == sorted(HOMES)
    for name, home in HOMES.items():
        assert getattr(generative, name) is getattr(importlib.import_module(f"generative.{home}"), name)
        assert name in dir(generative)
    found: dict = {}
    exec("from generative import *", found)
    assert set(HOMES) <= set(found)


def test_other_names_are_modules_or_errors():
    from generative import guidance

    assert guidance.__name__ == "generative.guidance"
    with pytest.raises(AttributeError, match="module 'generative' has no attribute 'smaple'"):
        _ = generative.smaple
    with pytest.raises(ImportError, match="cannot import name 'smaple'"):
        exec("from generative import smaple")


def test_the_package_is_imported_without_its_modules():
    source = """
import sys
import generative
before = {name for name in sys.modules if name.startswith("generative.")} | {"jax"} & set(sys.modules)
assert not before, before
generative.GeometricBrownianMotion
assert "generative.likelihood" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
