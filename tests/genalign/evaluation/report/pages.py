"""What the tests of all pages share: a parser, saved evaluations of one sample, and texts that contain HTML."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from genalign.evaluation.evaluate import Evaluation, SampleRecord
from tests.genalign.evaluation.still_pipeline import PROTOCOL

HOSTILE = '"><script>document.title="run"</script><img src=x onerror=document.title="run"> {{ 7 * 7 }} & <b>bold</b>'


def save(folder, scores, prompt="a circle", task="single", file=None, protocol=PROTOCOL):
    """Save the evaluation of one sample."""
    Evaluation(protocol, (SampleRecord(prompt, task, 0, 0, file, scores),)).save(folder)


def reward_training(folder, rows, data, changed=(), **config):
    """Write the folder of a reward's training without its weights, and return it."""
    folder.mkdir(exist_ok=True)
    for name, lines in {"metrics": rows, "changed_pairs": changed}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "training_items.json").write_text("[]")
    return folder


def chromium(folder, *arguments):
    """Output and console messages of a headless browser that stays off the network."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("needs the program chromium (apt-get install chromium)")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    headless = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    command = [program, *headless, *quiet, f"--user-data-dir={folder}/profile", "--window-size=1100,2400", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


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
