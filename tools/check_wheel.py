"""Prove that a built wheel is complete and alone enough: python tools/check_wheel.py dist/NAME.whl

Reads its list of files, installs it into an empty environment with nothing but its own metadata to say what
it needs, and uses it from a folder outside the checkout.
"""

import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

PACKAGES = ("theory", "vi", "generative", "solvers", "paper_checks")
# Constraints install nothing by themselves: they only stop a release of tomorrow from failing this check.
CONSTRAINTS = Path(__file__).parent.parent / "requirements" / "lane-b.txt"


def check_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    foreign = [n for n in names if n.split("/")[0] not in PACKAGES and ".dist-info/" not in n]
    needed = [f"{package}/{file}" for package in PACKAGES for file in ("__init__.py", "py.typed")]
    needed += ["generative/datasets/digits8x8.npz", "generative/datasets/README.md"]
    # What lies beside the sources of a package goes with it, whatever its name.
    shipped = [
        p
        for folder in ("generative/datasets", "generative/weights", "solvers/weights")
        for p in Path(folder).glob("*.npz")
    ]
    needed += [p.as_posix() for p in shipped]
    needed += [f"solvers/weights/{name}" for name in ("poisson2d.json", "poisson3d.json")]
    missing = [n for n in needed if n not in names]
    if foreign or missing:
        sys.exit(f"{wheel.name}: files that do not belong: {foreign}; files that are missing: {missing}")
    print(f"{wheel.name}: {len(names)} files, all of {', '.join(PACKAGES)}")


def main(wheel: Path) -> None:
    check_contents(wheel)
    # Whatever the caller's environment adds to the import path would hide a missing dependency.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")

        def run(*command: str) -> None:
            start = time.monotonic()
            subprocess.run(command, cwd=folder, env=env, check=True)
            print(f"  {time.monotonic() - start:.0f} s  {' '.join(command[1:4])} ...", flush=True)

        pip = (python, "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS.resolve()))
        run(*pip, str(wheel))
        imports = f"import {', '.join(PACKAGES)}; from generative import data; data.load('digits8x8')"
        imports += "; from solvers import conjugate_direction, multigrid"
        imports += "; multigrid.load('poisson3d'); conjugate_direction.load('poisson3d')"
        run(python, "-c", imports)
        run(*pip, f"{wheel}[checks]")
        run(str(Path(folder) / "bin" / "paper-checks"), "list")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve(strict=True))
