"""What the tests of all pages share: a parser, saved evaluations of one sample, and texts that contain HTML."""

from html.parser import HTMLParser

from genalign.evaluation.evaluate import Evaluation, SampleRecord
from tests.genalign.evaluation.still_pipeline import PROTOCOL

HOSTILE = '"><script>document.title="run"</script><img src=x onerror=document.title="run"> {{ 7 * 7 }} & <b>bold</b>'


def save(folder, scores, prompt="a circle", task="single", file=None, protocol=PROTOCOL):
    """Save the evaluation of one sample."""
    Evaluation(protocol, (SampleRecord(prompt, task, 0, 0, file, scores),)).save(folder)


class Page(HTMLParser):
    """Tags, addresses and visible text of a page, and whether its tags close in order."""

    VOID = frozenset({"meta", "link", "input", "img", "line", "rect", "circle", "polyline", "polygon"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.labels, self.words, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.labels.append(values.get("aria-label"))
        self.addresses += [values[name] for name in ("src", "href") if name in values]
        assert not [name for name in values if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append((tag, values.get("id")))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] != "style":
            self.words.append((data, [name for _, name in self.open]))

    def within(self, name=None):
        """The text of the element with an id, or of the page."""
        return " ".join(" ".join(data for data, names in self.words if name is None or name in names).split())

    @property
    def text(self):
        return self.within()
