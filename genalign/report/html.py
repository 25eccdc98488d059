"""The page."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from genalign.checkpoints import write_text
from genalign.report import sections
from genalign.report.charts import charts
from genalign.report.reading import Run, read_run


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


def render(run: Run) -> str:
    """The page as text; whatever comes from the run is escaped."""
    source = files("genalign.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        name=run.folder.resolve().name,
        headline=sections.headline(run),
        charts=charts(run.rows),
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
