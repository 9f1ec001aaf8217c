"""`write_choice`: the survey of a run and the pair picked from it -> one HTML page that needs
nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dreamblend.evaluation.measures import MEASURES, SHOWN, title
from dreamblend.report.curves import curve
from dreamblend.report.pictures import embed, is_small, open_image
from dreamblend.report.template import STYLE
from dreamblend.report.text import is_number, number, setting
from dreamblend.storage.files import save_text

_TEMPLATE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{{ heading }}</title>
<style>{{ style }}</style></head>
<body><main>
<h1>{{ heading }}</h1>
{% if choice.get("reasons") %}
<dl><dt>early: step {{ choice.early }}</dt><dd>{{ choice.reasons.early }}</dd><dt>late: step {{ choice.late }}</dt><dd>{{ choice.reasons.late }}</dd>
{% if choice.get("best") %}<dt>the best alone: step {{ choice.best.step }}</dt><dd>{{ choice.best.reason }}</dd>{% endif %}
{% if choice.get("collapsed") %}<dt>the last one</dt><dd>{{ choice.collapsed }}</dd>{% endif %}
</dl>
{% else %}
<p>No pair was picked: without judges nothing says how well the images show subject and prompt.{% if choice.get("collapsed") %} But {{ choice.collapsed }}.{% endif %}</p>
{% endif %}
<div class="curves">
{% for one in curves %}
<figure><b>{{ one.measure | heading }}</b><figcaption>{{ one.meaning }}</figcaption>{{ one.drawing }}</figure>
{% endfor %}
</div>
<p class="soft">Means over the probe images, ± their standard errors.</p>
<div class="scroll"><table class="numbers">
<thead><tr><th scope="col">images of</th>{% for m in measures %}<th scope="col">{{ m | heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, row in rows %}
<tr><th scope="row">{{ name }}</th>
{% for m in measures %}<td>{{ row[m] | number }}{% if row.error.get(m) is number %} ± {{ row.error[m] | number }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if images.rows %}
<h2>The same prompts and seeds</h2>
{% for row in images.rows %}
<h3>{{ row.prompt }} <small class="soft">seed {{ row.seed }}</small></h3>
<div class="snapshots" style="--columns: {{ images.heads | length }}">
{% for cell in row.cells %}
<figure>{% if cell %}<img class="picture{{ " pixelated" if images.pixelated }}" src="{{ cell }}" alt="{{ images.heads[loop.index0] }}">{% else %}<div class="absent">none</div>{% endif %}<figcaption>{{ images.heads[loop.index0] }}</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
{% endif %}
<details class="provenance"><summary>Settings</summary><dl>{% for key, value in about %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></details>
</main></body></html>
"""


def write_choice(run: Path, choice: dict[str, Any], images: dict[str, Path] | None = None) -> Path:
    """Write `run/pair.html` from what pair.json says, and return its path; checkpoints.html where
    no pair was picked.

    `images` are folders of what each snapshot draws alone, by its name in `choice`
    (`Survey.image_folders`).
    """
    singles = [choice["base"], *choice["snapshots"]]
    picked = "reasons" in choice
    marks = {role: choice[role] for role in ("early", "late")} if picked else {}
    curves = []
    for measure in SHOWN:
        if points := [(row["step"], row[measure]) for row in singles if is_number(row[measure])]:
            curves.append(
                {
                    "measure": measure,
                    "meaning": MEASURES[measure].meaning,
                    "drawing": curve(measure, points, [p for p, _ in points], marks),
                }
            )
    rows = [(row["name"], row) for row in singles] + [
        (f"{row['name']}, blended", row) for row in choice["blends"]
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(number=number, heading=title)
    about = [(key, setting(value)) for key, value in choice["about"].items()]
    page = environment.from_string(_TEMPLATE).render(
        heading=f"The {'pair' if picked else 'checkpoints'} of {run}",
        images=_images(choice, images or {}),
        style=Markup(STYLE),
        choice=choice,
        curves=curves,
        measures=SHOWN,
        rows=rows,
        about=about,
    )
    path = run / ("pair.html" if picked else "checkpoints.html")
    save_text(page, path)
    return path


def _images(choice: dict[str, Any], folders: dict[str, Path]) -> dict[str, Any]:
    """What the template says of the images: a row a prompt with its first seed, a cell a
    snapshot. No row where none was kept, as by surveys of earlier versions.
    """
    about, rows, small = choice["about"], [], True
    for i, prompt in enumerate(about["prompts"]):
        seed, cells = about["seeds"][0], []
        for folder in folders.values():
            path = folder / f"{i}-{seed}.png"
            image = open_image(path)
            cells.append(embed(path, image) if image else None)
            small = small and (image is None or is_small(image))
        if any(cells):
            rows.append({"prompt": prompt, "seed": seed, "cells": cells})
    return {"heads": list(folders), "rows": rows, "pixelated": small}
