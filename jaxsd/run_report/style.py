"""How a page looks, in light and in the dark."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f24; --soft: #667080;
  --rule: #e3e6eb; --warn: #9a3412; --good: #e7f5ec; --c0: #2f6fde; --c1: #d9480f; --c2: #2b8a3e;
  --c3: #9c36b5; --c4: #0b7285; --c5: #a61e4d; }
@media (prefers-color-scheme: dark) { :root { --page: #12151a; --card: #1b2027; --ink: #e7eaee;
  --soft: #98a3b3; --rule: #2c333d; --warn: #ffa94d; --good: #16352a; --c0: #74a9ff; --c1: #ff922b;
  --c2: #69db7c; --c3: #da77f2; --c4: #3bc9db; --c5: #f783ac; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px 16px 64px; }
header h1 { margin: 0; font-size: 26px; overflow-wrap: anywhere; }
header p { margin: 2px 0; }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 14px 18px; margin-top: 16px; }
h2 { margin: 0 0 10px; font-size: 17px; } h3 { margin: 18px 0 6px; font-size: 15px; }
a { color: var(--c0); }
.note, figcaption { color: var(--soft); font-size: 13px; }
.note { margin: 6px 0 0; }
.warning { border-left: 4px solid var(--warn); padding: 6px 12px; margin: 16px 0 0;
  background: var(--card); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .x { text-anchor: middle; } svg .y { text-anchor: end; }
path { fill: none; } path.line { stroke: var(--rule); }
path.mark { stroke: var(--soft); stroke-dasharray: 2 4; }
path.curve { stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
path.raw { stroke-width: 1; opacity: .38; }
.c0 { stroke: var(--c0); --own: var(--c0); } .c1 { stroke: var(--c1); --own: var(--c1); }
.c2 { stroke: var(--c2); --own: var(--c2); } .c3 { stroke: var(--c3); --own: var(--c3); }
.c4 { stroke: var(--c4); --own: var(--c4); } .c5 { stroke: var(--c5); --own: var(--c5); }
.legend { margin: 4px 0 0 58px; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px;
  color: var(--soft); }
.key::before { content: ""; display: inline-block; width: 18px; height: 3px; margin-right: 6px;
  vertical-align: middle; background: var(--own, var(--soft)); }
.key.raw::before { opacity: .38; }
.scales, .wide { overflow-x: auto; } .scales svg { min-width: 560px; }
.scales label { margin-right: 12px; font-size: 13px; color: var(--soft); }
.scales .log, .scales .linear { display: none; margin-top: 6px; }
.to-log:checked ~ .log, .to-linear:checked ~ .linear { display: block; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr));
  gap: 14px 20px; margin-top: 14px; }
figure { margin: 0; }
.grid b { color: var(--ink); }
.album { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
.album img { display: block; max-width: min(100%, 304px); height: auto; border-radius: 4px; }
.album figure:first-child { flex-basis: 100%; }
.album figure:first-child img { max-width: min(100%, 640px); }
img.pixels { image-rendering: pixelated; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 3px 12px 3px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); font-weight: 400; }
th { color: var(--soft); white-space: nowrap; }
td { white-space: nowrap; }
td.best { font-weight: 600; background: var(--good); }
dl { margin: 0; columns: 300px; column-gap: 36px; font-size: 14px; }
dl div { display: flex; justify-content: space-between; gap: 16px; break-inside: avoid;
  border-bottom: 1px solid var(--rule); padding: 3px 0; }
dt { color: var(--soft); } dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
pre { overflow-x: auto; background: var(--page); padding: 10px 12px; border-radius: 6px;
  font-size: 13px; }
"""
