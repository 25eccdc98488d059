"""genalign learn-users: rewards and embeddings of people from a file of comparisons, and users added to them later."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

from genalign.cli.main import main
from genalign.diffusion.user_attention import Users
from genalign.runtime.media import read_image
from genalign.types import Prompt
from rewards.backbones.clip_encoder import load_clip
from rewards.pal import PALReward

COLORS = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0)}


def _images(folder: Path) -> None:
    """Discs of four colors, at places of their own."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    for color, values in COLORS.items():
        for place in range(6):
            disc = ((rows - 20 - 4 * place) ** 2 + (columns - 32) ** 2) < 200
            image = torch.where(disc, torch.tensor(values)[:, None, None], torch.full((3, 64, 64), 0.5))
            save_image(image, folder / f"{color}-{place}.png")


def _preferences(folder: Path, name: str, users: dict[str, str], places: range) -> Path:
    """Each user prefers discs of one color to those of every other."""
    lines = [
        {
            "prompt": "a circle",
            "user": user,
            "image_0": f"{favorite}-{place}.png",
            "image_1": f"{other}-{place}.png",
            "label_0": 1.0,
        }
        for user, favorite in users.items()
        for other in COLORS
        if other != favorite
        for place in places
    ]
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _learn(folder: Path, preferences: Path, *more: str) -> int:
    learner = ["--learner.class_path", "rewards.pal.PALLearner", "--learner.init_args.model", "shapes-clip"]
    steps = ["--learner.init_args.fit.steps", "150", "--learner.init_args.fit.learning_rate", "0.01"]
    return main(["learn-users", "--preferences", str(preferences), *learner, *steps, *more])


def test_tastes_are_learned_and_a_new_user_is_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _images(tmp_path)
    seen = {"ada": "red", "bob": "green", "cy": "blue"}
    assert _learn(tmp_path, _preferences(tmp_path, "p.jsonl", seen, range(5)), "--output", str(tmp_path / "u")) == 0
    assert "held out" in capsys.readouterr().out
    reward = PALReward(str(tmp_path / "u"))
    discs = torch.stack([_image(tmp_path, f"{color}-5.png") for color in COLORS])
    for user, favorite in seen.items():
        scores = reward(discs, [Prompt("a circle", {"user": user})] * 4)
        assert list(COLORS)[int(scores.argmax())] == favorite
    mean = reward(discs, [Prompt("a circle")] * 4)
    assert mean.shape == (4,) and bool(mean.isfinite().all())
    with pytest.raises(ValueError, match="user 'dee' is not known"):
        reward(discs, [Prompt("a circle", {"user": "dee"})] * 4)

    few = _preferences(tmp_path, "few.jsonl", {"dee": "red"}, range(1))
    added = ("--output", str(tmp_path / "more"), "--known", str(tmp_path / "u"))
    assert _learn(tmp_path, few, *added) == 0
    later = PALReward(str(tmp_path / "more"))
    assert list(COLORS)[int(later(discs, [Prompt("a circle", {"user": "dee"})] * 4).argmax())] == "red"
    of_ada = [Prompt("a circle", {"user": "ada"})] * 4
    torch.testing.assert_close(later(discs, of_ada), reward(discs, of_ada))


def _image(folder: Path, name: str) -> torch.Tensor:
    return read_image(folder / name)


def test_embeddings_are_mean_differences_of_features(tmp_path: Path) -> None:
    _images(tmp_path)
    learner = ["--learner.class_path", "rewards.user_embeddings.MeanDifferenceLearner"]
    command = ["learn-users", *learner, "--learner.init_args.model", "shapes-clip"]
    first = _preferences(tmp_path, "p.jsonl", {"ada": "red"}, range(1))
    assert main([*command, "--preferences", str(first), "--output", str(tmp_path / "u")]) == 0
    (ada,) = Users.load(tmp_path / "u").embeddings.values()
    encoder = load_clip("shapes-clip")
    with torch.no_grad():
        features = {
            color: F.normalize(encoder(_image(tmp_path, f"{color}-0.png")[None]), dim=-1)[0] for color in COLORS
        }
    others = torch.stack([features[color] for color in COLORS if color != "red"])
    expected = F.normalize((features["red"] - others).mean(0), dim=0) * len(ada[0]) ** 0.5
    torch.testing.assert_close(ada[0], expected, rtol=1e-4, atol=1e-5)
    later = _preferences(tmp_path, "q.jsonl", {"bob": "green"}, range(2))
    added = ("--preferences", str(later), "--output", str(tmp_path / "v"), "--known", str(tmp_path / "u"))
    assert main([*command, *added]) == 0
    both = Users.load(tmp_path / "v").embeddings
    assert both.keys() == {"ada", "bob"} and torch.equal(both["ada"], ada)


def test_the_reward_has_a_gradient(tmp_path: Path) -> None:
    _images(tmp_path)
    _learn(tmp_path, _preferences(tmp_path, "p.jsonl", {"ada": "red"}, range(2)), "--output", str(tmp_path / "u"))
    samples = torch.rand(2, 3, 64, 64).requires_grad_()
    (gradient,) = torch.autograd.grad(
        PALReward(str(tmp_path / "u"))(samples, [Prompt("a circle", {"user": "ada"})] * 2).sum(), samples
    )
    assert float(gradient.abs().max()) > 0
    with torch.no_grad():
        broken = samples.clone()
        broken[0, 0, 0, 0] = torch.nan
        scores = PALReward(str(tmp_path / "u"))(broken, [Prompt("a circle")] * 2)
    assert scores.isnan().tolist() == [True, False]


def test_comparisons_that_nothing_is_learned_from_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _images(tmp_path)
    path = tmp_path / "p.jsonl"
    line = {"prompt": "a", "image_0": "red-0.png", "image_1": "blue-0.png", "label_0": 1.0}
    for row, message in (
        (line, "judgment 1 has no annotator: add annotator, user or user_id"),
        (line | {"user": "ada", "label_0": 0.5}, "contains only ties"),
    ):
        path.write_text(json.dumps(row) + "\n")
        assert _learn(tmp_path, path, "--output", str(tmp_path / "u")) != 0
        assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(FileNotFoundError, match="learn one with genalign learn-users"):
        PALReward(str(tmp_path / "none"))(torch.rand(1, 3, 64, 64), [Prompt("a")])
