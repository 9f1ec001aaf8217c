"""`write_comparison`: the results of a benchmark -> one HTML page that needs nothing else, and its
figures as files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from dreamblend.errors import InputError
from dreamblend.evaluation.measures import COMPARED, title
from dreamblend.evaluation.outcome import said
from dreamblend.evaluation.statistics import estimate
from dreamblend.report import figures
from dreamblend.report.pictures import embed, heat_maps, open_image
from dreamblend.report.template import STYLE
from dreamblend.report.text import interval, number, setting
from dreamblend.storage.files import atomically, save_text

_OWN_STYLE = """
.figure svg { max-width: 46rem; font: inherit; } .figure svg text { fill: #1d1f23; }
.figure { background: #fff; padding: .75rem; border-radius: 6px; margin-top: .75rem; }
.numbers small { color: var(--soft); display: block; font-size: .75rem; line-height: 1.2; }
.numbers .source { white-space: normal; text-align: left; min-width: 13rem; } .numbers .question { white-space: normal; min-width: 13rem; }
.strip { display: flex; gap: .5rem; overflow-x: auto; margin-top: .5rem; } .strip figure { margin: 0; flex: 0 0 6.5rem; }
.strip img { width: 100%; display: block; border-radius: 4px; image-rendering: pixelated; } .strip .map { image-rendering: auto; margin-top: .35rem; }
.strip figcaption { font-size: .75rem; line-height: 1.25; overflow-wrap: anywhere; } .strip img:not(.map) + figcaption { min-height: 4.7rem; }
"""
_TEMPLATE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Benchmark: {{ results.benchmark }}</title>
<style>{{ style }}</style></head>
<body><main>
<header><h1>Benchmark: {{ results.benchmark }}</h1>
<p class="lead">{{ results.subjects | length }} subjects: {{ results.subjects | join(", ") }}. Intervals hold 95 % and are over subjects.</p></header>
{% if drawings.front %}
<section><h2>Subject and prompt</h2>
<p class="soft">Means over all subjects and images, one point a snapshot or setting of a blend. Open markers are single snapshots, or blends of another
pair; the grey band joins the points that no other one of all beats in both.</p><div class="figure">{{ drawings.front }}</div></section>
{% endif %}
{% if drawings.diversity %}
<section><h2>Subject and diversity</h2><div class="figure">{{ drawings.diversity }}</div></section>
{% endif %}
{% if results.questions %}
<section><h2>What was asked</h2>
<p class="soft">Asked before the run{% if results.plan %}, in a plan written on {{ results.plan.written }}{% endif %}; values with their 95 % intervals over subjects.</p>
<div class="scroll"><table class="numbers">
<thead><tr><th scope="col">question</th><th scope="col" class="source">of what</th><th scope="col">value</th><th scope="col">95 %</th></tr></thead><tbody>
{% for row in results.questions %}
<tr><th scope="row" class="question">{% if loop.changed(row.question) %}{{ row.question }}{% endif %}</th><td class="source">{{ row.of }}</td><td>{{ row.value | number }}</td><td>{{ row | interval }}</td></tr>
{% endfor %}
</tbody></table></div></section>
{% endif %}
{% if results.front and results.front[0].measured %}
<section><h2>Hypervolume, and prompt fidelity at fixed subject fidelities</h2>
<p class="soft">Hypervolume: the area of subject and prompt fidelity that a family's points reach above ({{ results.reference | join(", ") }}). Prompt at a share: the prompt fidelity at that
share of the way in subject fidelity from the method's base to its late snapshot, on the straight lines between the family's points, which have the base and the late snapshot
among them; more points on a line add nothing. Higher is better.</p>
<div class="scroll"><table class="numbers">
<thead><tr><th scope="col"></th>{% for m in results.front[0].measured %}<th scope="col">{{ m }}</th>{% endfor %}<th scope="col">points</th></tr></thead><tbody>
{% for row in results.front %}
<tr{% if row.kind != "single" %} class="blend"{% endif %}><th scope="row">{{ row.name }}</th>
{% for cell in row.measured.values() %}<td>{{ cell.value | number }}<small>{{ cell | interval }}</small></td>{% endfor %}<td>{{ row.points | length }}</td></tr>
{% endfor %}
</tbody></table></div></section>
{% endif %}
{% if results.sweep %}
<section><h2>Blends against the snapshots of their own run</h2>
<p class="soft">How much more a blend has than the sweep of plain snapshots, the same subjects drawn for both: an interval above zero is a win.</p>
<div class="scroll"><table class="numbers">
<thead><tr><th scope="col"></th>{% for m in results.sweep[0].measured %}<th scope="col">{{ m }}</th>{% endfor %}</tr></thead><tbody>
{% for row in results.sweep %}
<tr><th scope="row">{{ row.a }} over {{ row.b }}</th>{% for cell in row.measured.values() %}<td>{{ cell.value | number }}<small>{{ cell | interval }}</small></td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div></section>
{% endif %}
{% if drawings.curves %}
<section><h2>Over the steps</h2><div class="figure">{{ drawings.curves }}</div></section>
{% endif %}
{% if strips %}
<section><h2>The same prompt and seed</h2><p class="soft">Of each family the point with the highest product of both fidelities over all subjects;
below each image where its words attended, over all steps, each map by its own maximum.</p>
{% for strip in strips %}
<h3>{{ strip.subject }}: {{ strip.prompt }}, seed {{ strip.seed }}</h3>
<div class="strip">
{% for one in strip.images %}
<figure><img src="{{ one.source }}" alt="{{ one.name }}"><figcaption>{{ one.name }}</figcaption>
{% for map in one.maps %}
<img class="map" src="{{ map.source }}" alt="where {{ map.word }} attends"><figcaption>{{ map.word }}</figcaption>
{% endfor %}
</figure>
{% endfor %}
</div>
{% endfor %}
</section>
{% endif %}
{% if rows %}
<section><h2>Every point</h2>
<p class="soft">A blend is named with the settings that are not its defaults. Above the snapshots: a blend's prompt fidelity minus what its method's base and snapshots have at the same subject fidelity, the best of all
straight lines between two of them.</p>
<div class="scroll"><table class="numbers">
<thead><tr><th scope="col"></th>{% for m in measures %}<th scope="col">{{ m | heading }}</th>{% endfor %}
<th scope="col">above the snapshots</th></tr></thead><tbody>
{% for row in rows %}
<tr{% if row.kind != "single" %} class="blend"{% endif %}><th scope="row">{{ row.name }}</th>{% for cell in row.cells %}<td>{{ cell.value | number }}
{%- if cell.interval %}<small>{{ cell | interval }}</small>{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div></section>
{% endif %}
{% if results.literature %}
<section><h2>Beside published numbers</h2>
<p class="soft">Of each family here the point with the highest product of both fidelities, by the protocol {{ (results.protocol or {}).name }}: what another
protocol or other photos give does not compare.</p>
<div class="scroll"><table class="numbers">
<thead><tr><th scope="col"></th>{% for m in beside[0]["values"] %}<th scope="col">{{ m | heading }}</th>{% endfor %}
<th scope="col" class="source">source</th></tr></thead><tbody>
{% for row in beside %}
<tr{% if row.source == "here" %} class="blend"{% endif %}><th scope="row">{{ row.name }}</th>
{% for v in row["values"].values() %}<td>{{ v | number }}</td>{% endfor %}<td class="source">{{ row.source }}</td></tr>
{% endfor %}
</tbody></table></div></section>
{% endif %}
<details class="provenance"><summary>Settings and provenance</summary>
{% for title, entries in tables %}
<h3>{{ title }}</h3><dl>{% for key, value in entries %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% endfor %}
</details>
</main></body></html>
"""


def write_comparison(out: Path) -> Path:
    """Write `out/comparison.html` from `out/results.json`, and `out/figures/*.svg` and `*.png`;
    return the page's path.

    Raises InputError where results.json is absent or damaged. What it does not say has no section.
    """
    results = _read(out / "results.json")
    families = _families(results)
    drawings = {}
    if families:
        known = [
            m
            for m in COMPARED
            if any(not np.isnan(figures.mean(p, m)) for f in families for p in f["points"])
        ]
        over: list[str] = [
            m
            for m in ("subject", "prompt_fidelity", "diversity", "prior", "context_mass", "parts")
            if m in known
        ]
        made = {"front": figures.fronts(families), "curves": figures.curves(families, over)}
        if results["sweep"]:
            made["sweep"] = figures.differences(results["sweep"])
        if "diversity" in known:  # not of one image a prompt
            made["diversity"] = figures.fronts(families, up="diversity")
        for name, figure in made.items():
            for kind in ("svg", "png"):
                content = figures.drawn(figure, kind)
                _save(content, out / "figures" / f"{name}.{kind}")
                if kind == "svg":
                    text = content.decode()
                    drawings[name] = Markup(text[text.index("<svg") :])
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(number=number, heading=title, interval=interval)
    measures = list(COMPARED)
    tables = [
        (name, [(k, setting(v)) for k, v in results[name].items()])
        for name in ("settings", "protocol", "versions")
        if results.get(name)
    ]
    page = environment.from_string(_TEMPLATE).render(
        style=Markup(STYLE + _OWN_STYLE),
        results=results,
        drawings=drawings,
        measures=measures,
        rows=[_row(p, measures) for p in results["points"]],
        strips=_strips(out, results, families),
        beside=beside(results),
        tables=tables,
    )
    save_text(page, out / "comparison.html")
    return out / "comparison.html"


def _save(content: bytes, path: Path) -> None:
    atomically(path, lambda part: part.write_bytes(content))


def _read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text("utf-8"))
        return {
            "benchmark": "",
            "subjects": [],
            "points": [],
            "front": [],
            "sweep": [],
            "reference": [],
            **results,
        }
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): name the folder of a finished benchmark"
        ) from error


def beside(results: dict) -> list[dict[str, Any]]:
    """The results here beside published ones, in the published measures: rows of name, values by
    measure, and source.
    """
    published = results.get("literature") or []
    measures = list(dict.fromkeys(m for row in published for m in row["values"]))
    here = [{"name": "real photos", "values": results["real"]}] if results.get("real") else []
    here += [
        {
            "name": _shown(p),
            "values": {m: None if np.isnan(v := figures.mean(p, m)) else v for m in measures},
        }
        for p in _best(_families(results))
    ]
    rows = [{**row, "source": "here"} for row in here] + published
    return (
        [{**row, "values": {m: row["values"].get(m) for m in measures}} for row in rows]
        if published
        else []
    )


def _families(results: dict) -> list[dict]:
    """The fronts with their points."""
    points = {p["name"]: p for p in results["points"]}
    return [{**f, "points": [points[name] for name in f["points"]]} for f in results["front"]]


def _best(families: list[dict]) -> list[dict]:
    """Each family's point with the highest product of both fidelities."""
    return [
        max(
            f["points"],
            key=lambda p: figures.mean(p, "subject") * figures.mean(p, "prompt_fidelity"),
        )
        for f in families
    ]


def _row(point: dict, measures: list[str]) -> dict[str, Any]:
    """A point's means over subjects and how far above the snapshots it lies, with their
    intervals.
    """
    cells = []
    for measure in measures:
        values = [of.get(measure) for of in point["means"].values()]
        known = bool(values) and all(v is not None for v in values)
        cells.append(said(estimate(values)) if known else {"value": None, "interval": None})
    cells.append(point.get("above") or {"value": None, "interval": None})
    return {"name": _shown(point), "kind": point["kind"], "cells": cells}


def _shown(point: dict) -> str:
    """What a reader calls a point; results of a version before this one have its name alone."""
    return str(point.get("shown", point["name"]))


def _strips(out: Path, results: dict, families: list[dict]) -> list[dict[str, Any]]:
    """Each example's images, one a family: its best point."""
    best = {p["name"]: _shown(p) for p in _best(families)}
    strips = []
    for example in results.get("examples") or []:
        files = {best[name]: out / file for name, file in example["files"].items() if name in best}
        images = [
            {
                "name": name,
                "source": embed(path, image),
                "maps": heat_maps(image, path.with_suffix(".safetensors")),
            }
            for name, path in files.items()
            if (image := open_image(path))
        ]
        if images:
            strips.append(
                {**{k: example[k] for k in ("subject", "prompt", "seed")}, "images": images}
            )
    return strips
