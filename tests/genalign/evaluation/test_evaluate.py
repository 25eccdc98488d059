import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from genalign.evaluation.evaluate import (
    Evaluation,
    EvaluationProtocol,
    SampleRecord,
    noise_seed,
    plan_samples,
    suite_hash,
)
from genalign.evaluation.paired import gain, pairs_by_gain, task_gains
from genalign.types import Prompt, PromptSet
from tests.genalign.evaluation.still_pipeline import PROTOCOL


def prompt_set(**tasks):
    """Build a set with the given number of prompts of each task."""
    prompts = [
        Prompt(f"{task} {index}", {"tag": task, "prompt": f"{task} {index}"})
        for task, count in tasks.items()
        for index in range(count)
    ]
    return PromptSet("some", tuple(prompts))


def record(task, prompt, sample, image=None, **scores):
    return SampleRecord(prompt, task, sample, noise_seed(prompt, sample), image, scores)


@pytest.mark.parametrize(
    ("prompts", "used", "each"), [(6, 6, 16), (18, 18, 6), (964, 32, 3), (32, 32, 3), (33, 32, 3), (1, 1, 96)]
)
def test_plan_spreads_samples_over_prompts(prompts, used, each):
    specs = plan_samples(prompt_set(a=prompts), samples_per_task=96, seeds=3)
    counts = Counter(spec.prompt.text for spec in specs)
    assert len(counts) == used and set(counts.values()) == {each}


def test_plan_does_not_depend_on_order_or_repetition():
    prompts = prompt_set(a=50, b=3)
    shuffled = PromptSet("some", prompts.prompts[::-1] + prompts.prompts[:5])
    specs = plan_samples(shuffled, 12, 2)
    assert len(specs) == 24
    assert {spec.seed for spec in specs} == {spec.seed for spec in plan_samples(prompts, 12, 2)}
    with pytest.raises(ValueError, match="at least 1"):
        plan_samples(prompts, 0, 3)


def test_a_plan_without_a_size_takes_every_prompt_in_order():
    prompts = prompt_set(a=1, b=2)
    mixed = PromptSet("some", (prompts.prompts[1], *prompts.prompts))
    specs = plan_samples(mixed, None, 2)
    assert [(spec.prompt.text, spec.sample) for spec in specs] == [
        (text, sample) for text in ("b 0", "a 0", "b 1") for sample in (0, 1)
    ]


def test_noise_seed_depends_on_prompt_and_index_alone():
    assert noise_seed("a circle", 0) == 6748360023691882601
    seeds = {noise_seed(text, sample) for text in ("a circle", "a circle1", "") for sample in range(200)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_protocol_hash_is_stable_and_depends_on_every_field():
    assert PROTOCOL.hash == "f4e1cb1c3376909e"
    assert EvaluationProtocol.from_dict(json.loads(json.dumps(PROTOCOL.as_dict()))) == PROTOCOL
    assert replace(PROTOCOL, guidance=4).hash == PROTOCOL.hash
    assert replace(PROTOCOL, sigmas=(1.0, 0.5 + 1e-15, 0.0)).hash == PROTOCOL.hash
    for name, value in vars(PROTOCOL).items():
        other = value + ("x" if isinstance(value, str) else (1.0,) if isinstance(value, tuple) else 1)
        assert replace(PROTOCOL, **{name: other}).hash != PROTOCOL.hash


def test_suite_hash_depends_on_texts_metadata_and_order():
    prompts = prompt_set(a=3)
    changed = Prompt(prompts.prompts[0], {"tag": "a", "prompt": "a 0", "include": []})
    others = [prompts.prompts[::-1], prompts.prompts[:2], (changed, *prompts.prompts[1:])]
    hashes = {suite_hash(PromptSet("x", other)) for other in [prompts.prompts, *others]}
    assert len(hashes) == 4
    assert suite_hash(prompt_set(a=3)) == suite_hash(prompts)


def test_overall_is_the_mean_over_tasks_of_means_over_prompts():
    """Task a: prompts at 1/2 and 1, so 3/4. Task b: 1/3. Overall 13/24, by hand."""
    values = {"ap": (1.0, 0.0), "aq": (1.0,), "br": (1.0, 0.0, 0.0)}
    records = [record(*key, number, s=value) for key, each in values.items() for number, value in enumerate(each)]
    evaluation = Evaluation(PROTOCOL, tuple(records))
    assert evaluation.overall["s"].mean == pytest.approx(13 / 24)
    assert evaluation.tasks["a"]["s"].mean == pytest.approx(3 / 4)
    assert evaluation.tasks["b"]["s"].mean == pytest.approx(1 / 3)
    assert (evaluation.overall["s"].n, evaluation.tasks["b"]["s"].n) == (3, 1)


def noisy_prompts(shift):
    """Build an evaluation of prompts of very different difficulty, with ``shift`` added to every score."""
    records = [record("a", f"p{index}", sample, s=index / 40 + shift) for index in range(40) for sample in range(2)]
    return Evaluation(PROTOCOL, tuple(records))


def test_gain_is_paired():
    """A constant gain has an interval of zero width, though each mean alone has a wide one."""
    before, after = noisy_prompts(0.0), noisy_prompts(0.1)
    estimate = gain(before, replace(after, records=after.records[::-1]))["s"]
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == pytest.approx((0.1, 0.1, 0.1, 40))
    assert before.overall["s"].high - before.overall["s"].low > 0.1
    assert task_gains(before, after)["a"]["s"] == estimate


def test_gain_leaves_out_pairs_with_a_failed_score():
    before = Evaluation(PROTOCOL, (record("a", "p", 0, s=math.nan), record("a", "p", 1, s=0.0)))
    after = Evaluation(PROTOCOL, (record("a", "p", 0, s=1.0), record("a", "p", 1, s=0.5)))
    assert (gain(before, after)["s"].mean, gain(before, after)["s"].n) == (0.5, 1)


def test_gain_refuses_different_protocols_and_samples():
    before = noisy_prompts(0.0)
    after = replace(before, protocol=replace(PROTOCOL, guidance=1.0, dtype="bfloat16"))
    with pytest.raises(ValueError, match="cannot be compared") as error:
        gain(before, after)
    assert "guidance is 4.0 before and 1.0 after" in str(error.value)
    assert "dtype is 'float32' before and 'bfloat16' after" in str(error.value)
    assert "kernel" not in str(error.value)
    with pytest.raises(ValueError, match=r"1 samples are in only one of .* 'p39' \(a\), sample 1"):
        gain(before, replace(before, records=before.records[:-1]))


def test_worst_regressions_come_first():
    def evaluation(**scores):
        return Evaluation(PROTOCOL, tuple(record("a", name, 0, strict=s, partial=p) for name, (s, p) in scores.items()))

    before = evaluation(same=(1.0, 1.0), lost=(1.0, 1.0), lost_more=(1.0, 1.0), won=(0.0, 0.5), unscored=(1.0, 1.0))
    after = evaluation(same=(1.0, 1.0), lost=(0.0, 0.8), lost_more=(0.0, 0.2), won=(1.0, 1.0), unscored=(math.nan, 0.0))
    pairs = pairs_by_gain(before, after)
    assert [pair.before.prompt for pair in pairs] == ["lost_more", "lost", "same", "won"]
    assert pairs[0].differences == {"strict": -1.0, "partial": -0.8}
