"""The page."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from genalign.evaluation.report import sections
from genalign.evaluation.report.charts import charts, watched
from genalign.evaluation.report.reading import Run, read_run
from genalign.runtime.files import write_text


def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder, from the parts that are there (see ``reading.read_run``).

    The page is one file under 5 MB, without scripts; its content policy forbids it to load anything.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder does not exist.
    """
    path = run / "report.html"
    write_text(path, render(read_run(run)))
    return path


def page(template: str) -> Template:
    """A template of this package; a name that it lacks is an error, and values are escaped."""
    environment = Environment(
        loader=PackageLoader("genalign", "evaluation/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template)


def render(run: Run) -> str:
    """The page as text; whatever comes from the run is escaped."""
    return page("report.html.j2").render(
        name=run.folder.resolve().name,
        headline=sections.headline(run),
        charts=charts(run.rows),
        watched=watched(run.rows),
        tables=sections.tables(run),
        pairs=run.comparison.pairs if run.comparison else (),
        regressions=sections.regressions(run),
        improvements=sections.improvements(run),
        cost=sections.cost(run),
        protocol=sections.protocol(run),
        config=sections.flattened(run.config),
        environment=sections.flattened(run.environment),
        notes=run.notes,
    )
