"""What every unit test gets: shape checks on our packages, one hypothesis profile, `key` and `x64`."""

import sys
import zlib

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# The annotations of these packages are checked at run time in tests only.  The hook sees a package at its
# first import, so one that a plugin has already imported stays unchecked; the report header says which.
SHAPE_CHECKED = ("theory", "solvers", "generative", "vi")
UNCHECKED = tuple(name for name in SHAPE_CHECKED if name in sys.modules)
install_import_hook(list(SHAPE_CHECKED), "beartype.beartype")

# No deadline: the first example of every shape compiles.  Derandomised and without a database: a run depends
# on the sources alone.  Function-scoped fixtures are allowed, since `key` and `x64` hold no state that an
# example could change.
settings.register_profile(
    "proofstone",
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("proofstone")


def pytest_report_header() -> str:
    checked = ", ".join(name for name in SHAPE_CHECKED if name not in UNCHECKED)
    missing = f"; imported too early to be checked: {', '.join(UNCHECKED)}" if UNCHECKED else ""
    return f"shapes checked by jaxtyping and beartype: {checked or 'none'}{missing}"


@pytest.fixture
def key(request: pytest.FixtureRequest):
    """A PRNG key made from the test's id: the same in every run and order, another one for every test."""
    import jax

    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def x64():
    """Double precision for the length of one test; what was set before is restored."""
    from paper_checks.harness.numerics import enable_x64

    with enable_x64(True):
        yield


@pytest.fixture
def no_shape_checks(monkeypatch: pytest.MonkeyPatch):
    """For tests of a function's own messages about wrong shapes: users run without the checks of annotations."""
    from jaxtyping import config

    monkeypatch.setattr(config, "jaxtyping_disable", True)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """Each is mapped into memory in several pieces, and a process may have no more than some 65 000 of these."""
    import jax

    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """Compile without most optimisations, for modules that compile much and compute little."""
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
