"""The page about a training run, and the templates of all pages."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from genalign.evaluation.report import sections, summary, words
from genalign.evaluation.report.charts import chart_sections
from genalign.evaluation.report.reading import read_run
from genalign.evaluation.report.samples import samples_over_rounds
from genalign.runtime.files import write_text

_WORDS = (
    "count",
    "duration",
    "gain_label",
    "gain_mood",
    "interval",
    "mood",
    "number",
    "plain",
    "prompts",
    "scored",
    "signed",
    "titled",
)


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
    measured = run.before or run.after
    protocol = {"hash": measured.protocol.hash, **measured.protocol.as_dict()} if measured else {}
    details = {"Evaluation protocol": protocol, "Configuration": run.config, "Environment": run.environment}
    return write_page(
        folder / "report.html",
        "report.html.j2",
        unfinished=run.unfinished,
        subject=summary.subject(run.config),
        scores=list(measured.score_names) if measured else [],
        changes=summary.did_it_work(run),
        worse=summary.got_worse(run),
        cost=summary.cost(run),
        improved=summary.what_improved(run),
        about=summary.about_prompts(run),
        missing=summary.missing(run),
        sections=chart_sections(run.rows),
        samples=samples_over_rounds(folder, run.rows),
        tables=sections.tables(run.before, run.after, run.comparison),
        pairs=f"{len(pairs)} pairs of samples of {words.prompts(run.comparison.prompts)}" if run.comparison else "",
        details={title: sections.flattened(content) for title, content in details.items() if content},
        **sections.gallery(pairs, folder),
    )


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write a page from a template of this package, which may call ``_WORDS``, and return its path.

    Values are escaped, and names that the template does not know are errors; ``name`` is the page's folder.
    """
    environment = Environment(
        loader=PackageLoader("genalign", "evaluation/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_unbroken,
    )
    page = environment.get_template(template, globals={name: getattr(words, name) for name in _WORDS})
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by genalign {version('genalign')}"
    write_text(path, page.render(name=path.resolve().parent.name, written=written, **values))
    return path


def _unbroken(value: Any) -> Any:
    """Keep numbers and their percent sign on one line of a page."""
    return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", value) if type(value) is str else value
