"""What the scripts of this folder that compare programs share: fair timing, intervals, and files written whole."""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


class Compiled(NamedTuple):
    """A compiled program and what making it cost."""

    run: Callable[..., Any]
    trace_seconds: float
    compile_seconds: float
    flops: float | None


def compiled(make: Callable[[], Callable[..., Any]], *args: Any) -> Compiled:
    """Trace and compile `make()` for these arguments from nothing: every cache of jax is emptied before."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(make()).lower(*args)
    middle = time.perf_counter()
    program = lowered.compile()
    end = time.perf_counter()
    return Compiled(program, middle - start, end - middle, flops(program))


def flops(program: Any) -> float | None:
    """Floating-point operations as XLA counts them; None where it does not tell."""
    analysis = program.cost_analysis()
    if isinstance(analysis, list | tuple):  # one entry per program, up to jax 0.5
        analysis = analysis[0] if analysis else None
    return None if not analysis or "flops" not in analysis else float(analysis["flops"])


def compile_in_turns(
    programs: Mapping[str, Callable[[], Callable[..., Any]]], args: Sequence[Any], repeats: int, *, warm_up: bool = True
) -> dict[str, list[Compiled]]:
    """Every program compiled `repeats` times, in an order that rotates.

    warm_up: once more before, which is not kept, as the first compilation of a process pays for imports and for the start of
    the compiler's threads.
    """
    names = list(programs)
    found: dict[str, list[Compiled]] = {name: [] for name in names}
    for repeat in range(-1 if warm_up else 0, repeats):
        for name in rotated(names, repeat + 1):
            one = compiled(programs[name], *args)
            if repeat >= 0:
                found[name].append(one)
    return found


def rotated(names: Sequence[str], by: int) -> list[str]:
    by %= len(names)
    return [*names[by:], *names[:by]]


def time_in_turns(
    programs: Mapping[str, Callable[[int], Any]], blocks: int, seconds: float = 0.05, most_calls: int = 50
) -> dict[str, np.ndarray]:
    """Seconds per call, one number per block; within a block the programs take turns, each waited for.

    Each program is called with the number of the call.  How often it is called in a block, at least once, is set after
    the warm-up so that a block takes about `seconds`.
    """
    calls = {}
    for name, run in programs.items():
        jax.block_until_ready(run(0))
        start = time.perf_counter()
        jax.block_until_ready(run(1))
        calls[name] = int(np.clip(seconds / (time.perf_counter() - start), 1, most_calls))
    took: dict[str, list[float]] = {name: [] for name in programs}
    for block in range(blocks):
        for name in rotated(list(programs), block):
            start = time.perf_counter()
            for call in range(calls[name]):
                jax.block_until_ready(programs[name](call))
            took[name].append((time.perf_counter() - start) / calls[name])
    return {name: np.asarray(values) for name, values in took.items()}


def median_interval(values: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """The median and the ends of its 95 % percentile-bootstrap interval."""
    rng = np.random.default_rng(seed)
    medians = np.median(rng.choice(values, size=(draws, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(values)), float(low), float(high)


def about(*packages: str) -> dict[str, Any]:
    """Device, cores and versions, for the head of a result file; None for a package that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "versions": versions}


def write(path: Path, save: Callable[[str], Any]) -> None:
    """Save under a temporary name in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
    os.close(handle)
    try:
        save(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_json(target: Path, result: Mapping[str, Any]) -> None:
    write(target, lambda name: Path(name).write_text(json.dumps(result, indent=1) + "\n"))


def write_result(target: Path, result: Mapping[str, Any], fig: Any) -> None:
    """The result as JSON at `target`, the figure beside it as PNG and SVG."""
    write_json(target, result)
    for suffix in (".png", ".svg"):
        write(target.with_suffix(suffix), lambda name: fig.savefig(name, dpi=150))
