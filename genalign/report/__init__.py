"""One offline HTML page about a run."""

from genalign.report.html import write_report as write_report
