"""Draw the pictures of README.md and docs.

    python scripts/benchmarks/pictures.py runs/demo docs/images                        a finished run
    python scripts/benchmarks/pictures.py docs/results/search_shapes.json docs/images  searches at equal cost
    python scripts/benchmarks/pictures.py docs/results/benchmark_scale.json docs/images  what a round costs as it grows
    python scripts/benchmarks/pictures.py docs/results/benchmark_compare.json docs/images  accuracy against seconds
    python scripts/benchmarks/pictures.py docs/results/methods_shapes.json docs/images         a curve for each method
    python scripts/benchmarks/pictures.py docs/results/overoptimization_shapes.json docs/images  learned rewards

Figures are read from the files that are named; nothing is measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from genalign.evaluation.evaluate import load_evaluation
from genalign.evaluation.paired import gallery_improvements, pairs_by_gain
from genalign.evaluation.standings import Curve, mean_curve

COLUMNS = 8
SECONDS = (1, 2, 5, 10, 20)


def learning_curve(run: Path, output: Path) -> None:
    """Train reward, and strict accuracy on validation prompts with its interval, against minutes."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    left.plot([row["machine"]["seconds"] / 60 for row in rows], [row["reward"] for row in rows], color="#3366cc")
    left.set(xlabel="minutes of training", ylabel="train reward", title="reward while training")
    watched = [row for row in rows if row["held_out"]]
    minutes = [row["machine"]["seconds"] / 60 for row in watched]
    strict = {key: [row["held_out"]["strict"][key] for row in watched] for key in ("mean", "low", "high")}
    right.plot(minutes, strict["mean"], marker="o", color="#228855")
    right.fill_between(minutes, strict["low"], strict["high"], color="#228855", alpha=0.2)
    right.set(xlabel="minutes of training", ylabel="strict accuracy", title="validation prompts (95% interval)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(output / "learning_curve.png", dpi=120)


def before_after(run: Path, output: Path, scale: int = 2) -> None:
    """Draw samples that became correct, as the report's gallery does: before above, after from the same noise below."""
    pairs = pairs_by_gain(load_evaluation(run / "before"), load_evaluation(run / "after"))
    repaired = [pair for pair in gallery_improvements(pairs) if pair.became_correct]
    tasks = list(dict.fromkeys(pair.before.task for pair in repaired))
    pairs_of = [[pair for pair in repaired if pair.before.task == task][:2] for task in tasks]
    flat = [pair for group in pairs_of for pair in group][:COLUMNS]
    figure, axes = plt.subplots(2, len(flat), figsize=(1.5 * len(flat), 3.6), layout="constrained", squeeze=False)
    for column, pair in enumerate(flat):
        for row, (name, record) in enumerate((("before", pair.before), ("after", pair.after))):
            image = Image.open(run / name / str(record.image), formats=("PNG",))
            axes[row, column].imshow(image.resize((64 * scale, 64 * scale), Image.Resampling.NEAREST))
            axes[row, column].set(xticks=[], yticks=[])
        axes[0, column].set_title(pair.before.prompt.replace(" and ", "\nand ").replace(" of ", " of\n"), fontsize=7)
    axes[0, 0].set_ylabel("before")
    axes[1, 0].set_ylabel("after")
    figure.savefig(output / "before_after.png", dpi=120)


def search_curves(result: Path, output: Path) -> None:
    """The selection reward and the verifier's strict score of every search against its budget."""
    result_file = json.loads(result.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for place, (axis, label) in enumerate(zip(axes, ("selection reward", "strict accuracy (judge)"), strict=True)):
        for name, by_budget in result_file["curves"].items():
            dashed = "oracle" in name or "pool" in name
            means = [scores[place] for scores in by_budget.values()]
            axis.plot(result_file["budgets"], means, marker=".", linestyle=":" if dashed else "-", label=name)
        axis.set(xscale="log", xlabel="budget (images' cost)", ylabel=label, xticks=result_file["budgets"])
        axis.set_xticklabels(result_file["budgets"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(output / "search_curves.png", dpi=120)


def scale(result: Path, output: Path) -> None:
    """Seconds of a round against each number that was grown, on logarithmic axes beside a line of proportion."""
    rows = json.loads(result.read_text(encoding="utf-8"))["rows"]
    names = list(dict.fromkeys(row["name"].split(".")[0] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(3 * len(names), 3), layout="constrained", sharey=True)
    for axis, name in zip(axes, names, strict=True):
        mine = [row for row in rows if row["name"].startswith(f"{name}.")]
        values, seconds = [int(row["name"].split(".")[1]) for row in mine], [row["mean"] for row in mine]
        axis.plot(values, seconds, marker="o", color="#3366cc")
        axis.plot(values, [seconds[0] * value / values[0] for value in values], linestyle=":", color="#888888")
        axis.set(xscale="log", yscale="log", xlabel=name.replace("_", " "), xticks=values)
        axis.set_xticklabels(values)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yticks(SECONDS, SECONDS)
    axes[0].set_ylabel("seconds a round")
    figure.savefig(output / "scale.png", dpi=120)


def speed(result: Path, output: Path) -> None:
    """Held-out accuracy against seconds of training, a line for each seed, until the target."""
    result_file = json.loads(result.read_text(encoding="utf-8"))
    figure, axis = plt.subplots(figsize=(8, 3.5), layout="constrained")
    for number, (name, curves) in enumerate(result_file["curves"].items()):
        for place, curve in enumerate(curves):
            label = name.replace("_", " ") if place == 0 else None
            axis.plot(*zip(*curve, strict=True), color=f"C{number}", linewidth=1, label=label)
    axis.axhline(result_file["target"], linestyle=":", color="#888888")
    axis.set(xlabel="seconds of training", ylabel="strict accuracy (validation)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(output / "speed.png", dpi=120)


def method_curves(result: Path, output: Path) -> None:
    """Strict accuracy of each method beside Flow-GRPO, on validation prompts against NFE and against minutes.

    A thin line is a seed, a thick one their mean.
    """
    evaluations = json.loads(result.read_text(encoding="utf-8"))["evaluations"]
    for name in evaluations.keys() - {"flow_grpo"}:
        figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
        for label, color in {"flow_grpo": "#aaaaaa", name: "#3366cc"}.items():
            for panel, place, unit in zip(panels, (0, 1), (1, 60), strict=True):
                curves = [
                    Curve(tuple(row[place] / unit for row in run), tuple(row[2] for row in run))
                    for run in evaluations[label].values()
                ]
                for curve in curves:
                    panel.plot(curve.costs, curve.scores, color=color, linewidth=0.7, alpha=0.6)
                mean = mean_curve(curves)
                panel.plot(mean.costs, mean.scores, color=color, linewidth=2, label=label)
        panels[0].set(xlabel="NFE", ylabel="strict accuracy", title="validation prompts")
        panels[1].set(xlabel="minutes of training", title="validation prompts")
        for axis in panels:
            axis.grid(alpha=0.3)
        panels[0].legend()
        figure.savefig(output / f"curve_{name}.png", dpi=100)
        plt.close(figure)


def overoptimization(result: Path, output: Path) -> None:
    """The truth against the distance from the base model while learned rewards are optimized.

    Of best-of-n the means over seeds, of training a line for each seed. DRAGON has a panel of its own, since its
    distance is of another kind.
    """
    content = json.loads(result.read_text(encoding="utf-8"))
    figure, panels = plt.subplots(1, 4, figsize=(17, 4), layout="constrained", sharey=True)
    for name, by_seed in content["best_of_n"].items():
        runs = list(by_seed.values())
        distances = [point["kl"] ** 0.5 for point in runs[0]]
        truths = [[point["truth"]["mean"] for point in run] for run in runs]
        means = [sum(column) / len(column) for column in zip(*truths, strict=True)]
        panels[0].plot(distances, means, label=name.replace("_", " "))
    for number, (name, by_seed) in enumerate(content["curves"].items()):
        panel = panels[3 if name == "dragon" else 1 if name in content["best_of_n"] else 2]
        for place, run in enumerate(by_seed.values()):
            label = name.replace("_", " ") if place == 0 else None
            panel.plot([point[0] for point in run], [point[2] for point in run], color=f"C{number % 10}", label=label)
    step = "square root of a step's KL, a mean over dimensions"
    titles = {
        "best of n (suite comp)": "square root of the KL of the best of n",
        "Flow-GRPO by the reward (suite val)": step,
        "guards and the verifier (suite val)": step,
        "DRAGON (suite val)": "root mean square change of predictions",
    }
    for panel, (title, distance) in zip(panels, titles.items(), strict=True):
        panel.set(xlabel=distance, title=title)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0].set_ylabel("strict accuracy")
    figure.savefig(output / "overoptimization.png", dpi=110)


OF_RESULTS = {
    "overoptimization_shapes": overoptimization,
    "methods_shapes": method_curves,
    "search_shapes": search_curves,
    "benchmark_scale": scale,
    "benchmark_compare": speed,
}


def main() -> None:
    """Draw the pictures of a finished run or of a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.source.suffix == ".json":
        OF_RESULTS[options.source.stem](options.source, options.output)
    else:
        learning_curve(options.source, options.output)
        before_after(options.source, options.output)


if __name__ == "__main__":
    main()
