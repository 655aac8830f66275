"""What must hold of the repository as a whole: no addresses or machine paths, provenance of data, versions and
pins that agree, and a set-up that finds its interpreter, repairs itself and is idle when nothing changed."""

import hashlib
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

REGISTRY = re.compile(
    r"pypi[.]org|pythonhosted[.]org|npmjs[.](?:org|com)|deb[.]debian[.]org|anaconda[.]org|download[.]pytorch[.]org"
    r"|--(?:extra-)?index-ur[l]|--find-link[s]|--trusted-hos[t]"
)
MACHINE_PATH = re.compile(r"(?<![\w.~*}-])/(?:root|home|tmp|work|Users|mnt)/\w")
DATA_SUFFIXES = {".npz", ".npy", ".csv", ".safetensors", ".gz", ".png", ".mat", ".pkl"}
LICENCE = re.compile(r"\b(?:CC0|CC BY|MIT|BSD|Apache-2\.0|public domain)\b")


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the repository is unknown")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def lines_with(pattern: re.Pattern[str], path: Path, content: bytes) -> list[str]:
    if b"\0" in content:
        return []
    lines = content.decode("utf-8").splitlines()
    return [f"{path}:{i}: {line.strip()[:120]}" for i, line in enumerate(lines, 1) if pattern.search(line)]


@pytest.mark.parametrize("pattern", [REGISTRY, MACHINE_PATH], ids=["registry", "machine path"])
def test_no_file_names_a_registry_or_a_machine(pattern):
    files = tracked_files()
    assert ROOT / "pyproject.toml" in files
    assert [line for p in files for line in lines_with(pattern, p.relative_to(ROOT), p.read_bytes())] == []


@pytest.mark.parametrize(
    ("pattern", "line"),
    [
        (REGISTRY, "https://" + "pypi" + ".org/simple"),
        (REGISTRY, "pip install --" + "index-url X"),
        (MACHINE_PATH, "see " + "/home" + "/me/x"),
        (MACHINE_PATH, "open('" + "/tmp" + "/x')"),
    ],
)
def test_the_patterns_find_what_they_are_for(pattern, line):
    assert lines_with(pattern, Path("x"), b"first\n" + line.encode()) == [f"x:2: {line}"]


def undocumented(data: Path, readme: str) -> str | None:
    """What the folder's README lacks about one data file: its name, checksum and licence, on one line."""
    checksum = hashlib.sha256(data.read_bytes()).hexdigest()
    entries = [line for line in readme.splitlines() if data.name in line and checksum in line]
    if not entries:
        return f"{data}: no line of README.md beside it holds its name and SHA-256 {checksum}"
    return None if any(LICENCE.search(line) for line in entries) else f"{data}: its entry names no licence"


def test_every_shipped_data_file_states_origin_licence_and_checksum():
    packages = ("theory", "vi", "generative", "solvers", "paper_checks")
    files = [p for package in packages for p in (ROOT / package).rglob("*") if p.suffix in DATA_SUFFIXES]
    assert ROOT / "generative/datasets/digits8x8.npz" in files
    readmes = {p: p.with_name("README.md").read_text() for p in files}
    assert [found for p in files if (found := undocumented(p, readmes[p]))] == []


def test_missing_provenance_is_found(tmp_path):
    data = tmp_path / "a.npz"
    data.write_bytes(b"1")
    checksum = hashlib.sha256(b"1").hexdigest()
    assert "no line" in undocumented(data, f"| a.npz | MIT | {checksum[:-1]}0 |")
    assert "no licence" in undocumented(data, f"| a.npz | {checksum} |")
    assert undocumented(data, f"| a.npz | CC BY 4.0 | {checksum} |") is None


def test_versions_agree():
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    changelog = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation and changelog
    assert citation[1] == changelog[1] == PROJECT["version"]


def pins(lane: str, python: str) -> dict[str, str]:
    """Name -> version of the lines of a lane that hold for a Python version, each an exact pin without address."""
    found: dict[str, str] = {}
    for line in (ROOT / f"requirements/lane-{lane}.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        assert pin.url is None and re.fullmatch(r"==[\w.]+", str(pin.specifier)), line
        if pin.marker is None or pin.marker.evaluate({"python_version": python, "sys_platform": "linux"}):
            name = canonicalize_name(pin.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = str(pin.specifier)[2:]
    return found


TORCH = {"torch", "deepinv"}  # two gigabytes for one benchmark: declared, and in neither environment


@pytest.mark.parametrize(
    ("lane", "python", "extras", "absent"),
    [
        ("a", "3.11", ("checks", "peers", "notebooks", "bench", "dev"), TORCH),
        ("a", "3.12", ("checks", "peers", "notebooks", "bench", "dev"), TORCH),
        ("b", "3.11", ("checks", "peers", "notebooks", "bench"), TORCH | {"genjax"}),
        ("b", "3.12", ("checks", "peers", "notebooks", "bench"), TORCH | {"genjax"}),
        ("b", "3.13", ("checks", "peers", "notebooks", "bench"), TORCH | {"genjax"}),
    ],
)
def test_the_pins_satisfy_what_the_package_declares(lane, python, extras, absent):
    pinned = pins(lane, python)
    declared = PROJECT["dependencies"] + [r for e in extras for r in PROJECT["optional-dependencies"][e]]
    wanted = [Requirement(r) for r in declared if not r.startswith("proofstone")]
    missing = {r.name for r in wanted if canonicalize_name(r.name) not in pinned}
    assert missing == absent
    wrong = [str(r) for r in wanted if r.name not in absent and pinned[canonicalize_name(r.name)] not in r.specifier]
    assert wrong == []


# A stand-in for an interpreter: answers the questions of tools/environment.sh, writes down what it is asked to
# do, and "creates an environment" by copying itself.  `$LOG.fail` holds how many installations are to fail.
FAKE_PYTHON = r"""#!/bin/sh
case "$*" in
    *"-c import ensurepip"*) echo "@VERSION@" ;;
    *"-m venv"*) echo "venv $4" >> "$LOG"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
    *"-m pip install"*)
        case "$*" in *--editable*) echo project >> "$LOG" ;; *) echo pins >> "$LOG" ;; esac
        left=$(cat "$LOG.fail" 2>/dev/null || echo 0)
        [ "$left" -eq 0 ] || { echo $((left - 1)) > "$LOG.fail"; exit 1; } ;;
    *) exit 9 ;;
esac
"""
# What a version manager leaves on the path for a version that is installed but not selected.
STUB = "#!/bin/sh\necho 'command not found: select a version first' >&2\nexit 127\n"


class Machine:
    """A checkout and a path on which only fake interpreters exist."""

    def __init__(self, folder: Path) -> None:
        self.checkout, self.bin, self.log = folder / "checkout", folder / "bin", folder / "log"
        self.bin.mkdir()
        self.home = folder / "home"
        (self.checkout / "tools").mkdir(parents=True)
        (self.checkout / "requirements").mkdir()
        for name in ("tools/environment.sh", "requirements/lane-a.txt", "requirements/lane-b.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.checkout / name)
        for tool in ("sh", "cat", "cksum", "cp", "dirname", "mkdir", "rm", "tr"):
            (self.bin / tool).symlink_to(shutil.which(tool))

    def python(self, path: str, version: str | None) -> None:
        target = self.bin / path
        target.parent.mkdir(parents=True, exist_ok=True)
        short = version and ".".join(version.split(".")[:2])
        target.write_text(FAKE_PYTHON.replace("@VERSION@", f"{short} {version}") if version else STUB)
        target.chmod(0o755)

    def run(self, lane: str = "a", **extra: str) -> tuple[int, list[str], str]:
        """Exit status, what was done, and what was said."""
        self.log.write_text("")
        env = {"PATH": str(self.bin), "HOME": str(self.home), "LOG": str(self.log), **extra}
        command = [str(self.bin / "sh"), str(self.checkout / "tools/environment.sh"), lane]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        return done.returncode, self.log.read_text().split("\n")[:-1], done.stdout + done.stderr


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_setup_builds_once_and_is_then_idle(machine):
    machine.python("python3.11", "3.11.9")
    assert machine.run()[:2] == (0, ["venv .venv", "pins", "project"])
    assert machine.run() == (0, [], "")


def test_setup_passes_by_a_stub_and_an_old_python(machine):
    machine.python("python3.11", None)
    machine.python("python3", "3.10.1")
    machine.python("python3.12", "3.12.4")
    code, did, said = machine.run()
    assert (code, did) == (0, ["venv .venv", "pins", "project"]) and "Python 3.12.4" in said


def test_setup_looks_into_a_version_managers_folder(machine):
    machine.python("python3.12", None)
    machine.python("../home/.pyenv/versions/3.12.1/bin/python", "3.12.1")
    code, _, said = machine.run("b")
    assert code == 0 and ".venv-b is ready (Python 3.12.1)" in said


def test_setup_without_a_python_says_what_it_tried(machine):
    machine.python("python3.11", None)
    machine.python("python3", "3.10.1")
    code, did, said = machine.run()
    assert (code, did) == (1, [])
    for part in ("3.11 3.12", "python3.11: absent, or cannot", "python3: 3.10 3.10.1", "make PYTHON="):
        assert part in said


@pytest.mark.parametrize("version", [None, "3.13.0"])
def test_setup_refuses_an_unsuitable_choice(machine, version):
    machine.python("python3.11", "3.11.9")
    machine.python("chosen", version)
    code, did, said = machine.run(PYTHON="chosen")
    assert (code, did) == (1, []) and "PYTHON=chosen cannot be used" in said


def test_setup_takes_the_chosen_python_even_if_another_was_used_before(machine):
    machine.python("python3.11", "3.11.9")
    machine.python("chosen", "3.12.4")
    assert machine.run()[0] == 0
    code, did, said = machine.run(PYTHON="chosen")
    assert (code, did) == (0, ["venv .venv", "pins", "project"]) and "3.12.4" in said
    assert machine.run(PYTHON="chosen")[1] == []


def test_setup_tries_a_failed_installation_once_more(machine):
    machine.python("python3.11", "3.11.9")
    Path(f"{machine.log}.fail").write_text("1")
    assert machine.run()[:2] == (0, ["venv .venv", "pins", "pins", "project"])


def test_setup_starts_again_after_an_interruption(machine):
    machine.python("python3.11", "3.11.9")
    Path(f"{machine.log}.fail").write_text("2")
    assert machine.run()[0] != 0
    assert machine.run()[:2] == (0, ["venv .venv", "pins", "project"])


def test_setup_rebuilds_what_was_moved_or_lost_its_interpreter(machine):
    machine.python("python3.11", "3.11.9")
    assert machine.run()[0] == 0
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("elsewhere"))
    assert machine.run()[1] == ["venv .venv", "pins", "project"]
    (machine.checkout / ".venv/bin/python").write_text(STUB)
    assert machine.run()[1] == ["venv .venv", "pins", "project"]


def test_setup_follows_changes_of_pins_and_project(machine):
    machine.python("python3.11", "3.11.9")
    assert machine.run()[0] == 0
    with (machine.checkout / "pyproject.toml").open("a") as file:
        file.write("\n")
    assert machine.run()[1] == ["project"]
    with (machine.checkout / "requirements/lane-a.txt").open("a") as file:
        file.write("# changed\n")
    assert machine.run()[1] == ["venv .venv", "pins", "project"]
