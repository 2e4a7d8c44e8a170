"""How the report looks: one style sheet, light and dark by the reader's setting, readable by every kind of eye.

The palette is Okabe and Ito's (Color Universal Design, 2008) without its yellow, which vanishes on white; ``c7`` is
grey. An element takes its colour from a class ``c0`` to ``c7``, so that pictures and legends agree.
"""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fcfcfb; --card: #ffffff; --ink: #1c2024; --soft: #626a73; --rule: #e3e5e8; --faint: #eef0f2;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b6659a; --c4: #c98a00; --c5: #3a9bd0;
  --c6: #7a5ea8; --c7: #80868d; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --card: #1b1f23; --ink: #e6e8ea; --soft: #9aa3ac; --rule: #2e343a; --faint: #242a30;
  --c0: #4aa8e0; --c1: #f08a3c; --c2: #2fc498; --c3: #db92bf; --c4: #e8b23a; --c5: #7cc4ec;
  --c6: #a98fd8; --c7: #8f979f; } }
.c0 { --c: var(--c0) } .c1 { --c: var(--c1) } .c2 { --c: var(--c2) } .c3 { --c: var(--c3) }
.c4 { --c: var(--c4) } .c5 { --c: var(--c5) } .c6 { --c: var(--c6) } .c7 { --c: var(--c7) }
.ink { --c: var(--ink) }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1136px; padding: 40px 24px 72px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
header { margin-bottom: 8px }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 6px }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 44px 0 12px; padding-top: 16px;
  border-top: 1px solid var(--rule) }
p { margin: 0 0 10px; max-width: 78ch } .lead { color: var(--soft); font-size: 16px }
nav a { color: var(--soft); text-decoration: none; margin-right: 18px; white-space: nowrap; display: inline-block }
nav a:hover { color: var(--ink) }
.state { font-weight: 600; color: var(--c) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(164px, 1fr)); gap: 12px; margin: 20px 0 24px }
.tile, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px }
.tile { padding: 12px 14px } .tile b { display: block; font-size: 21px; letter-spacing: -.01em; line-height: 1.35 }
.tile span { display: block; color: var(--soft); font-size: 13px }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(460px, 100%), 1fr)); gap: 16px;
  margin: 16px 0 }
figure { margin: 16px 0; padding: 14px 16px; min-width: 0 } .pair > figure { margin: 0 }
figcaption b { font-size: 15px } .unit { color: var(--soft); font-size: 13px; margin-left: 8px }
.legend { margin: 4px 0 2px; font-size: 13px; color: var(--soft); max-width: none }
.key { margin-right: 16px; display: inline-block }
.key::before { content: ""; display: inline-block; width: 16px; margin-right: 6px; vertical-align: 4px;
  border-top: 2.5px solid var(--c) }
.key.thin::before { opacity: .5 } .key.dashed::before { border-top-style: dashed }
.key.box::before { height: 11px; width: 11px; vertical-align: -1px; border: 1px solid var(--c); border-radius: 3px;
  background: color-mix(in srgb, var(--c) 26%, transparent) }
.key.skipped::before { height: 11px; width: 5px; vertical-align: -1px; border: 0; background: var(--c1); opacity: .55 }
.key.resume::before { height: 12px; width: 0; vertical-align: -2px; border-top: 0;
  border-left: 1.5px dashed var(--soft) }
.note, .missing { color: var(--soft); font-size: 13px; margin: 6px 0 0 }
.missing { font-style: italic; font-size: 15px }
.warning { border-left: 3px solid var(--c1); padding: 8px 14px; margin: 0 0 12px; background: var(--card) }
.warning ul { margin: 4px 0 }
.scroll { overflow-x: auto }
svg { display: block; margin-top: 8px } svg.chart { width: 100%; height: auto; min-width: 400px }
svg.wide { min-width: 720px }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif;
  fill: var(--soft); font-variant-numeric: tabular-nums }
.grid { stroke: var(--faint) } .axis { stroke: var(--rule) }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round }
.line.thin { stroke-width: 1; opacity: .5 } .line.dashed { stroke-dasharray: 5 4; stroke-linecap: butt }
.dot { fill: var(--c) }
.skipped { fill: var(--c1); fill-opacity: .3 } .resume { stroke: var(--soft); stroke-dasharray: 3 3; fill: none }
.strip { fill: var(--ink); fill-opacity: 0 } .strip:hover { fill-opacity: .07 }
.cell { fill: var(--c); fill-opacity: .26; stroke: var(--c); stroke-opacity: .75 }
.cell.end { --c: var(--soft); fill-opacity: .08; stroke-dasharray: 3 2 }
g:hover > .cell { fill-opacity: .6 }
.heat { fill: none; stroke: var(--c) }
svg .inside { font-size: 10.5px; fill: var(--ink); text-anchor: middle; pointer-events: none }
details { margin-top: 8px } summary { cursor: pointer; color: var(--soft); font-size: 13px }
details .scroll { margin-top: 6px }
table { border-collapse: collapse; font-size: 13.5px } th, td { padding: 5px 18px 5px 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid var(--faint) } thead th { color: var(--soft); font-weight: 500;
  white-space: nowrap }
tbody tr:last-child > * { border-bottom: 0 } .number { text-align: right }
.facts th { color: var(--soft); font-weight: 500; white-space: nowrap; width: 190px }
pre { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, "Liberation Mono", monospace; overflow-x: auto;
  background: var(--faint); border-radius: 6px; padding: 12px 14px; margin: 8px 0; white-space: pre-wrap }
footer { margin-top: 48px; color: var(--soft); font-size: 13px }
@media print { body { max-width: none; padding: 0 } figure, .tile { break-inside: avoid } nav { display: none } }
"""
