"""How report pages look, on a screen and on paper: one string for whole pages, one for everything inside."""

PAGE = """\
@page { size: A4; margin: 17mm 16mm 18mm;
  @bottom-right { content: counter(page) " / " counter(pages); font: 8pt serif; } }
html { background: #fff; -webkit-text-size-adjust: 100%; }
body { margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 2.1rem; font-weight: 600; letter-spacing: -0.01em; margin: 0; }
h2 { font-size: 1.45rem; font-weight: 600; line-height: 1.25; margin: 3.2rem 0 0.5rem; padding-top: 0.6rem;
  border-top: 2px solid #1d1d1d; }
.lead { font-size: 1.08rem; color: #444; margin: 0.3rem 0 1.2rem; }
.about { color: #444; margin: 0 0 1rem; }
.state { border-left: 5px solid; padding: 0.55rem 0.9rem; margin: 0 0 1.2rem; background: #f5f5f3; }
.state.good { border-color: #1a6b35; }
.state.bad { border-color: #b3261e; }
.state.doubt { border-color: #8a5a00; }
.columns dl { columns: 2; column-gap: 2rem; }
.columns dl > div { break-inside: avoid; }
@media (max-width: 46rem) {
  .columns dl { columns: 1; }
}
@media print {
  main { max-width: none; padding: 0; }
  html { font-size: 9.5pt; }
  h2 { margin-top: 2rem; }
}
"""

FRAGMENT = """\
.proofstone { font: 1rem/1.5 Charter, "Bitstream Charter", "Source Serif 4", "Source Serif Pro", "Iowan Old Style",
  Cambria, Georgia, "Liberation Serif", serif; color: #1d1d1d; font-variant-numeric: lining-nums; }
.proofstone math { font-family: "STIX Two Math", "Cambria Math", "Latin Modern Math", "STIX Math",
  "DejaVu Math TeX Gyre", math, serif; font-size: 1.04em; }
.proofstone math[display="block"] { margin: 0.7em 0; overflow-x: auto; overflow-y: hidden; }
.proofstone a { color: #1f4b8e; text-decoration-thickness: 1px; text-underline-offset: 2px; }
.proofstone h3 { font-size: 1.13rem; font-weight: 600; line-height: 1.35; margin: 0 0 0.35rem; }
.proofstone h4 { font-size: 0.95rem; font-weight: 600; margin: 1rem 0 0.3rem; }
.proofstone p { margin: 0.4rem 0; }
.proofstone .no { color: #555; margin-right: 0.25em; }
.proofstone .nobr { white-space: nowrap; }
.proofstone .nil { color: #999; }
.proofstone article { border-top: 1px solid #c9c9c4; padding-top: 1rem; margin: 1.8rem 0 0; }
.proofstone .statement { font-size: 1.1rem; line-height: 1.6; margin: 0.2rem 0 0.6rem; overflow-wrap: anywhere; }
.proofstone .reason { color: #333; font-style: italic; overflow-wrap: anywhere; }
.proofstone .notice { color: #6b4700; font-style: italic; }
.proofstone .chip { display: inline-block; white-space: nowrap; color: #fff; background: #57606a;
  font: 600 0.74rem/1.25 "Helvetica Neue", Arial, "Liberation Sans", sans-serif; vertical-align: 0.12em;
  padding: 0.16em 0.6em 0.18em 0.5em; border-radius: 0.9em;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.proofstone .chip.proved { background: #0b4224; }
.proofstone .chip.good { background: #1a6b35; }
.proofstone .chip.finding { background: #5a3fb0; }
.proofstone .chip.bad { background: #b3261e; }
.proofstone .chip.doubt { background: #8a5a00; }
.proofstone .chip.none { background: #57606a; }
.proofstone .chip.error { background: #000; }
.proofstone b.good { color: #1a6b35; font-weight: 600; white-space: nowrap; }
.proofstone b.bad { color: #b3261e; font-weight: 600; white-space: nowrap; }
.proofstone dl.facts { margin: 0.4rem 0; font-size: 0.93rem; }
.proofstone dl.facts > div { display: grid; grid-template-columns: 7.2rem 1fr; gap: 0 0.8rem; padding: 0.14rem 0; }
.proofstone dl.facts dt { color: #555; }
.proofstone dl.facts dd { margin: 0; overflow-wrap: anywhere; min-width: 0; }
.proofstone .two { display: grid; gap: 0 2rem; align-items: start; }
.proofstone .beside { display: flow-root; }
.proofstone .beside > figure { float: right; width: 50%; margin: 0 0 0.6rem 2rem; }
.proofstone .two.even { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.proofstone figure { margin: 0.4rem 0; }
.proofstone figure svg { display: block; }
.proofstone figcaption { font-size: 0.86rem; color: #444; margin-top: 0.25rem; line-height: 1.4; }
.proofstone .figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0.8rem 2rem;
  margin-top: 0.6rem; }
.proofstone .wide { overflow-x: auto; }
.proofstone table { border-collapse: collapse; width: 100%; font-size: 0.91rem; line-height: 1.4; margin: 0.4rem 0;
  border-top: 1.5px solid #1d1d1d; border-bottom: 1.5px solid #1d1d1d; background: none; }
.proofstone th, .proofstone td { text-align: left; vertical-align: top; padding: 0.3rem 0.7rem 0.3rem 0;
  font-weight: 400; border: 0; background: none; }
.proofstone th:last-child, .proofstone td:last-child { padding-right: 0; }
.proofstone thead th { border-bottom: 1px solid #1d1d1d; color: #444; font-size: 0.86rem; vertical-align: bottom; }
.proofstone tbody tr + tr > * { border-top: 1px solid #e4e4df; }
.proofstone tfoot th, .proofstone tfoot td { border-top: 1px solid #1d1d1d; font-weight: 600; }
.proofstone table.counts th:first-child { min-width: 13rem; }
.proofstone table.counts td, .proofstone table.counts thead th:not(:first-child) { text-align: center; }
.proofstone table.counts .chip { white-space: normal; border-radius: 0.45em; padding: 0.25em 0.4em; text-align: center;
  font-size: 0.68rem; }
.proofstone table.counts .chip span { display: block; font-size: 1.2em; }
.proofstone sup { font-size: 0.75em; line-height: 0; }
.proofstone .tight { display: inline-block; min-width: 6.2rem; white-space: nowrap; }
.proofstone .bar { display: block; height: 4px; width: 6.2rem; background: #dedfe0; margin-top: 2px;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.proofstone .bar i { display: block; height: 4px; background: #0072b2; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.proofstone code, .proofstone pre { font-size: 0.82em;
  font-family: "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.proofstone pre { background: #f6f6f4; border: 1px solid #e0e0da; padding: 0.6rem 0.8rem; margin: 0.3rem 0;
  line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
.proofstone .rerun { font-size: 0.91rem; color: #444; margin-top: 0.9rem; }
.proofstone .rerun code { color: #1d1d1d; user-select: all; }
@media (max-width: 46rem) {
  .proofstone .two.even, .proofstone .figures { grid-template-columns: minmax(0, 1fr); }
  .proofstone .beside > figure { float: none; width: auto; margin: 0.4rem 0; }
}
@media print {
  .proofstone a { color: inherit; text-decoration: none; }
  .proofstone h2, .proofstone h3, .proofstone h4 { break-after: avoid; }
  .proofstone figure, .proofstone tr, .proofstone dl.facts > div, .proofstone .state { break-inside: avoid; }
  .proofstone .statement { break-after: avoid; break-inside: avoid; }
  .proofstone p { orphans: 3; widows: 3; }
  .proofstone .wide { overflow: visible; }
  .proofstone .two, .proofstone .figures { gap: 0.5rem 1.2rem; }
  .proofstone .beside > figure { width: 44%; margin-left: 1.2rem; }
  .proofstone .figures { grid-template-columns: repeat(2, 42%); justify-content: space-between; }
  .proofstone .two.even th, .proofstone .two.even td { padding-top: 0.08rem; padding-bottom: 0.08rem; }
  .proofstone article { margin-top: 1.2rem; }
  .proofstone .rerun { break-before: avoid; break-inside: avoid; }
}
"""
