"""The paper, and what several of its claims use."""

from __future__ import annotations

from paper_checks.harness.claim import Paper

PAPER = Paper(
    stem="proximal",
    title="What's in a Prior? Learned Proximal Networks for Inverse Problems",
    authors="Zhenghan Fang, Sam Buchanan, Jeremias Sulam",
    year=2024,
    venue="ICLR",
    arxiv="2310.14344",
    claims=(
        *("P1", "P2", "P3", "P4", "P5", "P6", "P7", "P7'", "P8", "P9", "P10", "P11", "P12", "P13", "P14"),
        *("T1", "T1b", "T1c", "T1d", "T1e", "T1f", "T1g", "T1h", "T1i", "T1j", "T2", "T2b", "T2c"),
        *("T3", "T3b", "T3c", "T3d", "T4", "T4b", "E1", "E2", "E3", "E4"),
    ),
    note="The numbers are the project's own: the paper's text was not available, so that its statements are those of its "
    "public code, its reviews and later work, and its theorem numbers are recalled.  P: input-convex networks and their "
    "priors; T1, T2: proximal matching and what it aims at; T3, T4: plug-and-play iterations; E: experiments.  What is "
    "marked as derived is worked out here and not claimed of the paper.",
)
