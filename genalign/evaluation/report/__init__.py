"""Offline HTML pages: about a run, a search, an evaluation, and about several recipes."""

from genalign.evaluation.report.comparison_page import write_comparison as write_comparison
from genalign.evaluation.report.evaluation_page import write_evaluation as write_evaluation
from genalign.evaluation.report.html import write_report as write_report
from genalign.evaluation.report.search_page import write_search as write_search
