"""The verifiers of the worlds as judges of evaluations."""

import numpy as np
import pytest
import torch

from genalign.cli.main import world_scorers
from genalign.evaluation.evaluate import SampleRecord
from genalign.evaluation.paired import SamplePair
from genalign.evaluation.scorers import RewardScorer
from genalign.worlds.registry import WORLDS


@pytest.mark.parametrize("world", WORLDS)
def test_evaluations_record_whether_the_verifier_recognizes_a_sample(world: str) -> None:
    """Of a right sample, one of another prompt, noise and one that is not finite, every one may become correct."""
    prompts = [group[0] for group in WORLDS[world].prompts("comp").by_task().values()][:2]
    first, second = WORLDS[world].render([prompt.metadata or {} for prompt in prompts], np.random.default_rng(0))
    noise = torch.rand(first.shape, generator=torch.Generator().manual_seed(0))
    samples = torch.stack([first, second, noise, torch.full_like(first, torch.nan)])
    scorer = RewardScorer(world_scorers(world))
    assert scorer.score_names == ("strict", "partial", "relaxed")
    right, wrong, junk, failed = (
        SampleRecord("p", "t", 0, 0, None, score.scores, score.details)
        for score in scorer(samples, [prompts[0]] * len(samples))
    )
    assert right.details == {"strict": {"recognized": True}} and right.scores["strict"] == 1
    pairs = [SamplePair(before, right) for before in (wrong, junk, right, failed)]
    assert [pair.became_correct for pair in pairs] == [True, True, False, False]
    assert [pair.content_repaired for pair in pairs] == [True, False, False, False]
