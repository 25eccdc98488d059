"""Offline HTML pages: about a run, and about several recipes."""

from genalign.report.html import write_report as write_report
from genalign.report.search_page import write_search as write_search
from genalign.report.side_by_side import write_comparison as write_comparison
