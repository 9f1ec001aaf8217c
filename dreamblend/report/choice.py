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
from dreamblend.report.template import STYLE
from dreamblend.report.text import is_number, number, setting
from dreamblend.storage.files import save_text

_TEMPLATE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>The pair of {{ run }}</title>
<style>{{ style }}</style></head>
<body><main>
<h1>The pair of {{ run }}</h1>
<dl><dt>early: step {{ choice.early }}</dt><dd>{{ choice.reasons.early }}</dd><dt>late: step {{ choice.late }}</dt><dd>{{ choice.reasons.late }}</dd></dl>
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
<details class="provenance"><summary>Settings</summary><dl>{% for key, value in about %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></details>
</main></body></html>
"""


def write_choice(run: Path, choice: dict[str, Any]) -> Path:
    """Write `run/pair.html` from what pair.json says, and return its path."""
    singles = [choice["base"], *choice["snapshots"]]
    marks = {role: choice[role] for role in ("early", "late")}
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
        run=str(run),
        style=Markup(STYLE),
        choice=choice,
        curves=curves,
        measures=SHOWN,
        rows=rows,
        about=about,
    )
    save_text(page, run / "pair.html")
    return run / "pair.html"
