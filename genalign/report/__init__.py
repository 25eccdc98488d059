"""Offline HTML pages: about a run, a search, an evaluation, and about several recipes."""

from genalign.report.geneval_page import write_geneval as write_geneval
from genalign.report.html import write_report as write_report
from genalign.report.search_page import write_search as write_search
from genalign.report.side_by_side import write_comparison as write_comparison
