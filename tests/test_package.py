"""What importing pcnb does and gives."""
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from configparser import ConfigParser
from pathlib import Path

import pytest

import pcnb

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["tensorflow", "tensorflow_datasets", "sklearn", "matplotlib"]
# `cli` and `bench` are not part of `import pcnb`.
MODULES = [m.name for m in pkgutil.iter_modules(pcnb.__path__) if not m.name.startswith("_") and m.name not in ("cli", "bench")]

# `values` holds every option of JAX by name.
IMPORT = """
import json, sys, time
import jax, equinox
before = dict(jax.config.values)
start = time.perf_counter()
import pcnb
seconds = time.perf_counter() - start
changed = [name for name, value in before.items() if jax.config.values[name] != value]
print(json.dumps({"modules": sorted(sys.modules), "changed": changed, "seconds": seconds}))
"""


@pytest.fixture(scope="module")
def imported():
    # JAX raises on first use of a platform that does not exist: so importing pcnb uses no device.
    env = {**os.environ, "JAX_PLATFORMS": "none", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", IMPORT], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(f"import pcnb took {report['seconds']:.2f} s beyond jax and equinox")  # shown on failure and with `pytest -s`
    return report


def test_import_leaves_heavy_packages_alone(imported):
    found = [name for name in HEAVY if name in imported["modules"]]
    assert not found, f"import pcnb also imports {found}, and takes {imported['seconds']:.2f} s beyond jax and equinox"


def test_import_changes_no_jax_option(imported):
    assert imported["changed"] == []


def test_version_is_that_of_settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    assert pcnb.__version__ == config["DEFAULT"]["version"]


def test_public_names_exist_once():
    assert [name for name in pcnb.__all__ if not hasattr(pcnb, name)] == []
    exported = [name for m in MODULES for name in importlib.import_module(f"pcnb.{m}").__all__]
    # A name that two modules export would shadow itself in `pcnb`.
    assert [name for name, n in Counter(exported).items() if n > 1] == []
    assert [name for name, n in Counter(pcnb.__all__).items() if n > 1] == []


@pytest.mark.parametrize("name", pcnb.__all__)
def test_public_name_has_docstring(name):
    value = getattr(pcnb, name)
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        pytest.skip("neither a class nor a function")
    doc = value.__doc__ or ""
    # A dataclass without a docstring is given its signature as one.
    assert doc.strip() and not doc.startswith(f"{name}("), f"pcnb.{name} has no docstring"
