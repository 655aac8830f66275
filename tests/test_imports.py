"""Who may import whom, what may be imported only where it is used, and that importing does nothing else."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Folder -> what of ours it may import beside itself.  A name covers its submodules.
MAY_IMPORT = {
    "theory": (),
    "solvers": (),
    "vi": ("theory",),
    "generative": ("theory", "solvers.operators"),
    "paper_checks": ("theory", "solvers", "vi", "generative"),
    "benchmarks": ("theory", "solvers", "vi", "generative"),
    "notebooks": ("theory", "solvers", "vi", "generative", "paper_checks"),
    "tests": ("theory", "solvers", "vi", "generative", "paper_checks", "benchmarks", "notebooks"),
}
PACKAGES = ("theory", "solvers", "vi", "generative", "paper_checks")
# Not in the core requirements, or slow to import: only inside the function that needs them.
IMPORT_WHERE_USED = ("genjax", "neural_tangents", "matplotlib", "blackjax", "arviz", "pyamg")
# The packages themselves need no extra; only the suite is built on `checks`.
CHECKS_ONLY = ("pytest", "hypothesis", "beartype", "latex2mathml", "xdist")
JAX_INTERNALS = ("jax._src", "jax.extend", "jax.interpreters")
READS_JAXPRS = "vi/jaxpr.py"
CHOOSES_PLATFORM = "paper_checks/harness/numerics.py"


def covers(name: str, dotted: str) -> bool:
    return dotted == name or dotted.startswith(f"{name}.")


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST, lazy: bool = False) -> Iterator[tuple[str, str, int, bool]]:
    """Every import below `node`: full dotted name, the name it is bound to, line, and whether import time skips it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                top = alias.name.split(".")[0]
                yield alias.name, alias.asname or top, child.lineno, lazy
        elif isinstance(child, ast.ImportFrom):
            # A relative import stays inside its own package, which is always allowed.
            for alias in child.names if not child.level else ():
                yield f"{child.module}.{alias.name}", alias.asname or alias.name, child.lineno, lazy
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            yield from imports(ast.Module(child.body, []), True)
            yield from imports(ast.Module(child.orelse, []), lazy)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, lazy or inside)


def attributes(tree: ast.AST, bound: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Every dotted use of an imported name, written out in full: `j.config` after `import jax as j` is jax.config."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            if head in bound:
                yield f"{bound[head]}.{rest}", node.lineno


def violations(path: str, source: str) -> list[str]:
    """The rules that one file breaks; `path` is relative to the root of the repository."""
    folder = path.split("/")[0]
    tree = ast.parse(source)
    found = list(imports(tree))
    bad = []
    for name, _, line, lazy in found:
        top = name.split(".")[0]
        if top in MAY_IMPORT and top != folder and not any(covers(a, name) for a in MAY_IMPORT[folder]):
            bad.append(f"{path}:{line}: {folder} may not import {name}")
        where_used = top in IMPORT_WHERE_USED or (top in CHECKS_ONLY and folder != "paper_checks")
        if folder in PACKAGES and where_used and not lazy:
            bad.append(f"{path}:{line}: {top} must be imported inside the function that uses it")
    bound = {
        as_name: name if "." not in name or as_name != name.split(".")[0] else as_name for name, as_name, _, _ in found
    }
    uses = [(name, line) for name, _, line, _ in found] + list(attributes(tree, bound))
    for name, line in uses:
        if path != READS_JAXPRS and any(covers(internal, name) for internal in JAX_INTERNALS):
            bad.append(f"{path}:{line}: {name} may be used in {READS_JAXPRS} only")
        if folder in PACKAGES and path != CHOOSES_PLATFORM and covers("jax.config", name):
            bad.append(f"{path}:{line}: library code leaves {name} alone")
    return bad


def sources() -> list[Path]:
    return sorted(p for folder in MAY_IMPORT for p in (ROOT / folder).rglob("*.py"))


def test_every_file_keeps_the_rules():
    paths = {str(p.relative_to(ROOT)) for p in sources()}
    assert {f"{package}/__init__.py" for package in PACKAGES} <= paths
    assert [line for p in sorted(paths) for line in violations(p, (ROOT / p).read_text())] == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("theory/x.py", "import vi", "theory may not import vi"),
        ("theory/x.py", "def f():\n    from solvers import poisson", "theory may not import solvers.poisson"),
        ("solvers/x.py", "from theory.ntk import kernel", "solvers may not import theory.ntk"),
        ("vi/x.py", "import generative.data as d", "vi may not import generative.data"),
        ("generative/x.py", "from solvers import poisson", "generative may not import solvers.poisson"),
        ("generative/x.py", "import solvers", "generative may not import solvers"),
        ("vi/x.py", "import paper_checks", "vi may not import paper_checks"),
        ("benchmarks/x.py", "from paper_checks import run", "benchmarks may not import paper_checks.run"),
        ("paper_checks/x.py", "from tests import helpers", "paper_checks may not import tests.helpers"),
        ("notebooks/x.py", "import tests.helpers", "notebooks may not import tests.helpers"),
        ("theory/x.py", "import matplotlib.pyplot as plt", "matplotlib must be imported inside"),
        ("vi/x.py", "try:\n    import genjax\nexcept ImportError:\n    genjax = None", "genjax must be"),
        ("vi/x.py", "class A:\n    import arviz", "arviz must be imported inside"),
        ("paper_checks/x.py", "from neural_tangents import stax", "neural_tangents must be imported inside"),
        ("solvers/x.py", "from hypothesis import given", "hypothesis must be imported inside"),
        ("theory/x.py", "from jax._src import core", "jax._src.core may be used in vi/jaxpr.py only"),
        ("tests/x.py", "import jax.extend.core as jex", "jax.extend.core may be used in"),
        ("theory/x.py", "import jax\njax.extend.core.Jaxpr", "jax.extend.core.Jaxpr may be used in"),
        ("theory/x.py", "import jax as j\nj._src.core", "jax._src.core may be used in"),
        ("theory/x.py", "from jax import interpreters", "jax.interpreters may be used in"),
        ("vi/x.py", "import jax\njax.config.update('jax_enable_x64', True)", "leaves jax.config.update alone"),
        ("vi/x.py", "from jax import config", "leaves jax.config alone"),
        ("vi/x.py", "import jax.numpy as jnp, jax\njax.config.jax_enable_x64 = True", "leaves jax.config"),
    ],
)
def test_a_planted_violation_is_found(path, source, message):
    assert any(message in line for line in violations(path, source)), violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vi/x.py", "from theory import divergences\nfrom vi.jaxpr import run\nfrom . import adev"),
        ("generative/x.py", "from solvers.operators import laplacian\nfrom solvers import operators"),
        ("paper_checks/x.py", "import pytest, hypothesis, theory.ntk"),
        ("paper_checks/x.py", "def draw():\n    from matplotlib.figure import Figure"),
        ("vi/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import arviz"),
        ("vi/jaxpr.py", "import jax.extend.core as jex\nimport jax\njax.interpreters.ad"),
        ("paper_checks/harness/numerics.py", "import jax\njax.config.update('jax_platforms', 'cpu')"),
        ("tests/x.py", "import jax, matplotlib\nimport paper_checks\njax.config.jax_enable_x64"),
        ("theory/x.py", "config = 1\nclass A:\n    pass\nA.config = config\nimport jax.numpy as jnp\njnp.extend"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert violations(path, source) == []


IMPORT_ALL = """
import importlib, pkgutil, sys
import jax
before = dict(jax.config.values)
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
changed = sorted(k for k, v in jax.config.values.items() if k in before and v != before[k])
if changed:
    sys.exit("importing changed the JAX settings " + ", ".join(changed))
"""


def import_everything(package: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Import every module of a package in a process of its own, where any use of a device is an error."""
    # No such platform exists, so whatever initialises a backend fails there.
    env = {**os.environ, "PYTHONPATH": str(path), "JAX_PLATFORMS": "no_device_at_import"}
    command = [sys.executable, "-c", IMPORT_ALL, package]
    return subprocess.run(command, env=env, cwd=path, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_does_nothing_but_define(package):
    done = import_everything(package, ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("source", "output"),
    [
        ("import jax\njax.config.update('jax_enable_x64', True)", "changed the JAX settings jax_enable_x64"),
        ("import jax\nN = len(jax.devices())", "no_device_at_import"),
        ("import jax.numpy as jnp\nONE = jnp.ones(())", "no_device_at_import"),
        ("import warnings\nwarnings.warn('look')", "look"),
        ("print('hello')", "hello"),
    ],
)
def test_planted_work_at_import_is_found(tmp_path, source, output):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "__init__.py").write_text("")
    (tmp_path / "planted" / "inner.py").write_text(source)
    done = import_everything("planted", tmp_path)
    assert output in done.stdout + done.stderr
