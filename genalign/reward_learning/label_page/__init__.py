"""A page on which annotators judge the comparisons of a dataset's folder, in a browser. Extra: serve.

``questions`` turns ``comparisons.jsonl`` into what is asked, ``store`` holds what was answered and appends it to
``preferences.jsonl``, ``app`` serves both to ``page.html``, and ``agreement`` compares the annotators.
"""

from genalign.reward_learning.label_page.questions import LabelPageSettings
from genalign.reward_learning.label_page.serving import serve_labels

__all__ = ["LabelPageSettings", "serve_labels"]
