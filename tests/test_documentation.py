"""The Python examples of the README and of the guides run as they stand."""

import re
from pathlib import Path

import pytest

from paper_checks import Verdict, run

ROOT = Path(__file__).resolve().parents[1]


def examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def test_readme_library_example() -> None:
    (example,) = [e for e in examples("README.md") if "stability_report" in e]
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    report = names["report"]
    assert bool(report.threshold.converged)
    assert float(report.trace) <= float(report.exact) * (1 + 1e-5)  # 32-bit floats; the stated bound is the weaker one


@pytest.mark.slow
def test_readme_and_guide_examples_of_vi() -> None:
    for page in ("README.md", "docs/vi.md"):
        names: dict = {}
        for example in [e for e in examples(page) if "vi." in e]:
            exec(compile(example, page, "exec"), names)
        assert names["jnp"].isfinite(names["value"]), page
    assert {e.strategy for e in names["report"].estimates if e.agrees} >= {"reparam", "reinforce"}


@pytest.mark.slow
def test_readme_and_guide_examples_of_poisson_problems() -> None:
    for page in ("README.md", "docs/poisson.md"):
        names: dict = {}
        for example in [e for e in examples(page) if "poisson." in e or "conjugate_direction." in e]:
            exec(compile(example, page, "exec"), names)
            assert bool(names["info"].converged), example
            # The learned cycle; what the others need, their pages say.
            assert int(names["info"].steps) <= 8 or "conjugate_direction." in example or "baselines." in example
            assert names.get("failed", 0) == 0


@pytest.mark.slow
def test_readme_and_guide_examples_of_learned_priors() -> None:
    for page in ("README.md", "docs/proximal.md"):
        names: dict = {}
        for example in [e for e in examples(page) if "proximal." in e]:
            exec(compile(example, page, "exec"), names)
        assert names["info"].certificate.holds and bool(names["info"].converged), page


@pytest.mark.slow
def test_readme_and_guide_examples_of_multiplicative_diffusion() -> None:
    for page in ("README.md", "docs/gbm_diffusion.md"):
        names: dict = {}
        for example in [e for e in examples(page) if "samplers" in e]:
            exec(compile(example, page, "exec"), names)
        assert int(names["info"].evaluations) == 10 and bool((names["x"] > 0).all()), page
    assert names["digits"].shape == (10, 28, 28)


@pytest.mark.slow
def test_guide_example_is_a_claim_that_holds() -> None:
    (example,) = [e for e in examples("docs/adding_a_paper.md") if "@claim" in e]
    names: dict = {}
    exec(compile(example, "adding_a_paper.md", "exec"), names)
    result = run(names["trace_bound"])
    assert result.verdict is Verdict.HOLDS, result.reason
    assert result.controls["constant"].caught


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *[f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")]]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(
        r"`((?:docs|tests|notebooks|benchmarks|requirements)/[\w./]+\.\w+)`", text
    )
    for link in named:
        assert (ROOT / page).parent.joinpath(link).exists() or (ROOT / link).exists(), link
