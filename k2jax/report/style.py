"""The style sheet of a report page: light and dark from the reader's system, one column on a phone."""

CSS = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --muted: #5d6670; --grid: #dfe3e8; --alert: #b3261e;
  --run-0: #0072b2; --run-1: #d55e00; --run-2: #00855f; --run-3: #b0478a;
  --run-4: #9a6b00; --run-5: #3f8fd0; --run-6: #6b4bb0; --run-7: #6a6f76; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --card: #1d2126; --ink: #e8eaed; --muted: #a3abb4; --grid: #363c44; --alert: #ff8a80;
  --run-0: #5bb3f0; --run-1: #ff8f4d; --run-2: #3fcf9f; --run-3: #ee9bcd;
  --run-4: #e8b93e; --run-5: #a5dcff; --run-6: #bda4f5; --run-7: #b9bec5; } }
* { box-sizing: border-box; }
html { scroll-padding-top: 4rem; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, main { max-width: 82rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0 0 .5rem; }
h3 { font-size: 1rem; line-height: 1.3; margin: 0 0 .5rem; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
a { color: var(--run-0); }
p { margin: 0 0 .75rem; max-width: 48rem; }
section { margin: 2.25rem 0; }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem;
  list-style: none; margin: 1rem 0 0; background: var(--page); border-bottom: 1px solid var(--grid);
  padding: .5rem max(1.25rem, calc((100% - 82rem) / 2 + 1.25rem)); }
.legend li { overflow-wrap: anywhere; font-size: .9rem; }
.chip { display: inline-block; min-width: 1.5em; padding: 0 .3em; border-radius: .25em; text-align: center;
  font-weight: 700; background: var(--run); color: var(--card); }
.panels { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
figure { margin: 0; padding: 1rem; background: var(--card);
  border: 1px solid var(--grid); border-radius: .5rem; min-width: 0; }
figcaption { color: var(--muted); font-size: .875rem; margin-top: .5rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
.none { color: var(--muted); font-style: italic; margin: .5rem 0; }
.notes { margin: 0 0 1rem; padding: .6rem 1rem .6rem 2rem; background: var(--card); font-size: .9rem;
  border: 1px solid var(--grid); border-left: .3rem solid var(--alert); border-radius: .25rem; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); padding-bottom: .25rem; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top;
  overflow-wrap: anywhere; }
th:first-child, .prose td:last-child, .prose th:last-child { text-align: left; }
thead th { border-bottom: 2px solid var(--muted); white-space: nowrap; }
tbody th { font-weight: 500; }
details { margin-top: .5rem; font-size: .875rem; }
summary { cursor: pointer; color: var(--run-0); }
pre { background: var(--card); border: 1px solid var(--grid); border-radius: .5rem; padding: 1rem;
  overflow: auto; max-height: 30rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem;
  unicode-bidi: isolate; }
:focus-visible { outline: 2px solid var(--run-0); outline-offset: 2px; }
@media (max-width: 40rem) {
  header, main { padding-left: .75rem; padding-right: .75rem; } figure { padding: .75rem .5rem; }
  .legend { padding-left: .75rem; padding-right: .75rem; } }
@media print { .legend { position: static; } figure { break-inside: avoid; } }
"""
