"""The pages about a search and about several recipes."""

import json
import re

import numpy as np
from PIL import Image

from genalign.evaluation.compare_runs import RecipeSummary
from genalign.evaluation.report import write_comparison, write_search


def candidate(ended, score, parent=None, born=0):
    scores = [] if score is None else [[ended, [score]]]
    return {"prompt": 0, "parent": parent, "born": born, "scores": scores, "ended": ended}


def test_the_best_reward_so_far_never_falls(tmp_path):
    """The second prompt's candidates finish later, so the curve starts when both prompts have a score."""
    lineages = [
        [candidate(4, 0.9), candidate(4, 0.1), candidate(4, 0.95)],
        [candidate(2, 0.8), candidate(4, None), candidate(4, 0.3, parent=0, born=2)],
    ]
    (tmp_path / "lineage").mkdir()
    lines = []
    for index, candidates in enumerate(lineages):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{index}.png")
        (tmp_path / "lineage" / f"{index:05d}.json").write_text(json.dumps({"chosen": 2, "lives": candidates}))
        calls = {"nfe": 12, "decode": 3, "reward/ocr": 3}
        row = {"index": index, "prompt": "a dog", "scores": {"ocr": 0.5}, "image": f"{index}.png"}
        lines.append(json.dumps(row | {"calls": calls, "seconds": 3.0}))
    (tmp_path / "scores.jsonl").write_text("\n".join(lines))
    page = write_search(tmp_path).read_text()
    assert re.findall(r">([\d.]+) at (\d+) steps of candidates<", page) == [("0.6", "8"), ("0.625", "12")]
    assert page.count('class="returned"') == 4 and page.count('class="pruned"') == 3  # a copy has two lines
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.partition("<body>")[2]))
    assert "The best sample of 2 prompts ocr 0.5 decoded samples per prompt 3 NFE per prompt 12" in text


def test_recipes_of_unequal_cost_are_not_called_equal(tmp_path):
    def summary(name, gain, nfe):
        diversity = {"color": float("nan"), "cell": -0.25}
        return RecipeSummary(
            name,
            2,
            gain,
            gain - 0.1,
            gain + 0.1,
            {"strict": gain, "aesthetic": 1.5},
            {"two": gain},
            0.01,
            diversity,
            2.0,
            nfe,
        )

    path = tmp_path / "comparison.html"
    write_comparison(path, [summary("slow", 0.05, 2820.0), summary("fast", 0.25, 4610.0)])
    page = path.read_text()
    assert page.index("fast") < page.index("slow") and "equal NFE</h1>" not in page
    assert "a run took 2.82k to 4.61k NFE" in page and "+25.0" in page and "not measured" in page and "-0.250" in page
    write_comparison(path, [summary("slow", 0.05, 4600.0), summary("fast", 0.25, 4610.0)])
    assert "2 recipes at equal NFE</h1>" in path.read_text()
