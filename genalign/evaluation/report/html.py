"""The page about a training run, and the templates of all pages."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from genalign.evaluation.report import sections, summary, words
from genalign.evaluation.report.charts import chart_sections
from genalign.evaluation.report.reading import read_run
from genalign.evaluation.report.samples import samples_over_rounds
from genalign.runtime.files import write_text

_WORDS = ("count", "duration", "interval", "mood", "number", "plain", "scored", "signed")


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, from the parts that the run has so far.

    The page is one file without scripts, of at most some 6 MB; its content policy forbids it to load anything, and
    whatever comes from the run is escaped.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder does not exist, or is not a run's.
    """
    run = read_run(folder)
    pairs = run.comparison.pairs if run.comparison else ()
    measured, changes = run.before or run.after, summary.did_it_work(run)
    protocol = {"hash": measured.protocol.hash, **measured.protocol.as_dict()} if measured else {}
    details = {"Evaluation protocol": protocol, "Configuration": run.config, "Environment": run.environment}
    text = page("report.html.j2").render(
        name=folder.resolve().name,
        unfinished=run.unfinished,
        changes=changes,
        worse=summary.got_worse(run),
        cost=summary.cost(run),
        missing=summary.missing(run),
        sections=chart_sections(run.rows),
        samples=samples_over_rounds(folder, run.rows),
        tables=sections.tables(run.before, run.after, run.comparison),
        pairs=len(pairs),
        regressions=sections.regressions(pairs, folder / "before", folder / "after"),
        improvements=sections.improvements(pairs, folder / "before", folder / "after"),
        details={title: sections.flattened(content) for title, content in details.items() if content},
    )
    path = folder / "report.html"
    write_text(path, text)
    return path


def page(template: str) -> Template:
    """Load a template of this package, which may call ``_WORDS``; it escapes values, and unknown names are errors."""
    environment = Environment(
        loader=PackageLoader("genalign", "evaluation/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template, globals={name: getattr(words, name) for name in _WORDS})
