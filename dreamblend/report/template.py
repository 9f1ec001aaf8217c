"""The page's jinja2 template and its style sheet."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d1f23; --soft: #666b74; --line: #dfe1e6; --paper: #fbfbfa; --raised: #f1f2f2; --accent: #7a2f78; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e7e7ea; --soft: #9a9fa8; --line: #33363c; --paper: #16171a; --raised: #202226; --accent: #e89ac7; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 70rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1, h2, h3, p { margin: 0; overflow-wrap: anywhere; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; font-weight: 650; margin: 3.25rem 0 .25rem; }
h3 { font-size: 1.05rem; font-weight: 600; margin: 2.25rem 0 .5rem; }
p { max-width: 46rem; }
.lead { margin-top: .5rem; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.problems { margin: 1.25rem 0 0; padding: .5rem .875rem; border-left: 3px solid var(--accent); background: var(--raised); font-size: .875rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.photos { display: flex; flex-wrap: wrap; gap: .5rem; margin-top: .75rem; }
.photos img { height: 8rem; width: auto; border-radius: 4px; display: block; }
.pixelated { image-rendering: pixelated; }

table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.numbers { margin-top: .75rem; font-size: .9375rem; }
.numbers th, .numbers td { padding: .375rem 1.125rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
.numbers thead th { font-weight: 500; color: var(--soft); font-size: .875rem; white-space: normal; vertical-align: bottom; line-height: 1.3; }
.numbers th:first-child { text-align: left; padding-left: 0; font-weight: 600; }
.numbers .best { font-weight: 700; color: var(--accent); }
.numbers tr.blend { background: var(--raised); }
.numbers tr.blend th:first-child, .numbers tbody th:first-child { padding-left: .5rem; }
.numbers thead th:first-child { padding-left: .5rem; }

.grid-table { table-layout: fixed; width: 100%; }
.grid-table { max-width: calc(2.75rem + var(--kinds) * 18rem); min-width: calc(1.75rem + var(--kinds) * 7rem); }
.grid-table th { text-align: left; font-weight: 600; vertical-align: top; padding: 0 .75rem .5rem 0; line-height: 1.3; }
.grid-table th small { display: block; font-weight: 400; color: var(--soft); font-size: .8125rem; }
.grid-table tbody th { vertical-align: top; font-weight: 400; font-size: .8125rem; color: var(--soft); overflow-wrap: anywhere; }
.grid-table td { vertical-align: top; padding: 0 .75rem 1.5rem 0; }
.grid-table .seed { width: 2.75rem; padding-right: .375rem; }
.picture { display: block; width: 100%; height: auto; border-radius: 4px; }
.absent { display: grid; place-items: center; text-align: center; aspect-ratio: 1; border: 1px dashed var(--line); border-radius: 4px; }
.absent { color: var(--soft); font-size: .8125rem; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(3.625rem, 1fr)); gap: .375rem; margin-top: .375rem; }
.maps figure { margin: 0; min-width: 0; max-width: 6rem; }
.maps img { display: block; width: 100%; height: auto; border-radius: 3px; }
.maps figcaption { font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere; margin-top: .125rem; }
.scores { font-size: .8125rem; margin-top: .375rem; color: var(--soft); }
.scores b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.scores span { white-space: nowrap; margin-right: .625rem; }
summary { cursor: pointer; color: var(--soft); }
td details { font-size: .75rem; margin-top: .125rem; overflow-wrap: anywhere; }
.scale { display: inline-block; width: 6rem; height: .625rem; border-radius: 2px; margin: 0 .125rem; print-color-adjust: exact; }

.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: 1.75rem 2rem; margin-top: 1rem; }
.curves figure { margin: 0; break-inside: avoid; display: flex; flex-direction: column; }
.curves b { font-weight: 600; }
svg { display: block; width: 100%; max-width: 26rem; height: auto; margin-top: auto; padding-top: .375rem; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); }
svg .grid { stroke: var(--line); }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; }
svg .point { fill: var(--accent); stroke: transparent; stroke-width: 10; pointer-events: all; }
svg .mark { stroke: var(--soft); stroke-dasharray: 3 3; }

.snapshots { display: grid; gap: .5rem; max-width: calc(var(--columns) * 12rem); }
.snapshots { grid-template-columns: repeat(auto-fill, minmax(max(5rem, (100% - (var(--columns) - 1) * .5rem) / var(--columns)), 1fr)); }
.snapshots figure { margin: 0; break-inside: avoid; }

dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .125rem 1.25rem; margin: .375rem 0 1.25rem; font-size: .875rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.more { margin-top: 1rem; }
.provenance { margin-top: 3.25rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.provenance h3 { margin-top: 1.25rem; font-size: .9375rem; }

@media (max-width: 36rem) {
  main { padding: 1.5rem .875rem 3rem; }
  h1 { font-size: 1.625rem; }
  .photos img { height: 5.5rem; }
  .numbers { font-size: .875rem; }
  .numbers th, .numbers td { padding: .375rem .4375rem; }
  .grid-table { min-width: calc(1.25rem + var(--kinds) * 6rem); }
  .grid-table .seed { width: 1.25rem; }
  .grid-table .seed small { visibility: hidden; }
  .grid-table td, .grid-table th { padding-right: .5rem; }
  .maps { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .25rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  .grid-table { min-width: 0; max-width: calc(2.75rem + var(--kinds) * 11rem); }
  tr, .curves figure { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .provenance::details-content { content-visibility: visible; height: auto; }
}
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ subject }}: blend report</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header>
<h1>{{ subject }}</h1>
<p class="lead">
Early{% if early %} ({{ early }}){% endif %} is the underfit snapshot, which follows the prompt but barely knows the subject;
late{% if late %} ({{ late }}){% endif %} is the overfit one, which knows the subject but tends to ignore the prompt;
{% if blends %}{{ blends | join(", ") }} between them {{ "is the blend" if blends | length == 1 else "are the blends" }} of both, from the same noise.
{% else %}no blend of the two has been drawn yet.{% endif %}
</p>
{% if problems %}
<div class="problems">{% for problem in problems %}<p>{{ problem }}</p>{% endfor %}</div>
{% endif %}
</header>

{% if photos %}
<section>
<h2>Training photos</h2>
<div class="photos">
{% for photo in photos %}
<img src="{{ photo.source }}" alt="Training photo {{ loop.index }}"{% if photo.pixelated %} class="pixelated"{% endif %}>
{% endfor %}
</div>
{% if more_photos %}<p class="soft more">{{ more_photos }} more not shown.</p>{% endif %}
</section>
{% endif %}

{% if summary %}
<section>
<h2>Summary</h2>
<p class="soft">Means over the images; the best value of a measure is bold.
{%- for key in measures if key in lower %} For {{ key | heading }}, lower is better.{% endfor %}
{%- if judges %} Judges: {{ judges }}.{% endif %}{% if summary_note %} {{ summary_note }}{% endif %}</p>
<div class="scroll">
<table class="numbers">
<thead><tr><th scope="col"></th>
{%- for key in measures %}<th scope="col">{{ key | heading }}</th>{% endfor -%}
{% if counted %}<th scope="col">images</th>{% endif %}</tr></thead>
<tbody>
{% for row in summary %}
<tr{% if row.kind not in single %} class="blend"{% endif %}><th scope="row">{{ row.kind }}</th>
{%- for key in measures %}{% set value = row.get(key) | number -%}
<td{% if value == best.get(key) %} class="best"{% endif %}>{{ value }}</td>{% endfor -%}
{% if counted %}<td>{{ row.get("n") | number }}</td>{% endif %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endif %}

<section>
<h2>Images</h2>
{% if not sections %}<p class="soft">No images yet.</p>{% endif %}
{% if mapped %}
<p class="soft">Under an image: where each word of the prompt attends, from none
<span class="scale" style="background: linear-gradient(to right, {{ magma }})"></span> to that word's own maximum.</p>
{% endif %}
{% if hidden_rows %}
<p class="soft">{{ shown_rows }} rows are shown, spread over the prompts; {{ hidden_rows }} more are in images/.</p>
{% endif %}
{% for section in sections %}
<section>
<h3>{{ section.prompt }}</h3>
<div class="scroll">
<table class="grid-table" style="--kinds: {{ heads | length }}">
<thead><tr><th scope="col" class="seed"><small>seed</small></th>
{%- for head in heads %}<th scope="col">{{ head.kind }}{% if head.note %}<small>{{ head.note }}</small>{% endif %}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in section.rows %}
<tr>
<th scope="row" class="seed">{{ row.seed }}</th>
{% for cell in row.cells %}
<td>
{% if not cell %}<div class="absent">not drawn</div>
{% else %}
{% if cell.source %}<img class="picture{{ " pixelated" if cell.pixelated }}" src="{{ cell.source }}" alt="{{ cell.name }}">
{% else %}<div class="absent">file is missing or damaged</div>{% endif %}
{% if cell.maps %}
<div class="maps">
{% for map in cell.maps %}
<figure><img src="{{ map.source }}" alt="Attention of {{ map.word }}"><figcaption>{{ map.word }}</figcaption></figure>
{% endfor %}
</div>
{% endif %}
{% if cell.scores %}<p class="scores">{% for name, value in cell.scores %}<span>{{ name }} <b>{{ value }}</b></span> {% endfor %}</p>{% endif %}
<details><summary>details</summary>
{% for name, value in cell.measures %}{{ name }} {{ value }}<br>{% endfor %}
{{ cell.file }}{% if cell.sha256 %}<br>sha256 {{ cell.sha256[:16] }}{% endif %}
</details>
{% endif %}
</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
</section>
{% endfor %}
</section>

{% if collapse_measures %}
<section>
<h2>Attention collapse over training</h2>
<p class="soft">Each point is a snapshot{% if marked %}; the dashed lines are the early and the late one{% endif %}.
{%- if collapse_note %} {{ collapse_note }}{% endif %}</p>
<div class="curves">
{% for one in curves %}
<figure><b>{{ one.measure | heading }}</b><figcaption>{{ one.meaning }}</figcaption>{{ one.drawing }}</figure>
{% endfor %}
</div>
<details class="more"><summary>All values</summary>
<div class="scroll">
<table class="numbers">
<thead><tr><th scope="col">snapshot</th>
{%- for m in collapse_measures %}<th scope="col">{{ m | heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for s in snapshots %}
<tr><th scope="row">{{ s.name }}</th>
{%- for m in collapse_measures %}<td>{{ s.get(m) | number }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
</details>
</section>
{% endif %}

<details class="provenance">
<summary>Settings and provenance</summary>
{% for title, entries in tables %}
<h3>{{ title }}</h3>
<dl>{% for key, value in entries %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% endfor %}
<p class="soft">{{ image_count }} images; results.jsonl holds the settings, measures and SHA-256 of each.</p>
</details>
</main>
</body>
</html>
"""
