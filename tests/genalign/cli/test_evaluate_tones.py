"""``genalign evaluate tones`` on a model and on folders from another program, and other commands on tones."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from genalign import assets
from genalign.algorithms.recipes import dragon_set
from genalign.cli.context import prompt_set, require_rate
from genalign.cli.main import main
from genalign.evaluation.evaluate import EXTERNAL, Evaluation, load_evaluation
from genalign.runtime.media import save_images
from genalign.runtime.waveforms import resample, warn_once
from genalign.worlds import tones
from genalign.worlds.registry import WORLDS, world_of
from genalign.worlds.shapes.diversity import evaluation_diversity
from rewards.audio_guards import LevelWithin
from rewards.backbones.audio_features import FrameFeatures, LogMelFeatures
from rewards.clap import ClapReward
from rewards.combine import Gate
from rewards.set_rewards import PerSampleFrechetReward, VendiReward
from rewards.tones import TonesReward
from scripts.pretrain.tones_models import TonesTextToAudio, assemble, build_vae
from tests.packages import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
CONFIGS = ROOT / "scripts" / "configs"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a tiny random model with the architecture of the embedded one."""
    folder: Path = tmp_path_factory.mktemp("tones-audio") / "model"
    torch.manual_seed(0)
    assemble(TonesTextToAudio(layers=1, width=64), build_vae(), folder)
    return folder


def render(per_task: int, wrong: int = 0) -> tuple[list[str], Tensor]:
    """Return texts of every task with their clips; the first ``wrong`` of each task have the next task's clips."""
    prompts = [group[i] for group in tones.prompts("comp").by_task().values() for i in range(per_task)]
    shifts = [per_task if place % per_task < wrong else 0 for place in range(len(prompts))]
    sources = [prompts[(place + shift) % len(prompts)].metadata or {} for place, shift in enumerate(shifts)]
    clips = WORLDS["tones"].render(sources, np.random.default_rng(0))
    return [prompt.text for prompt in prompts], clips


def evaluate(tmp_path: Path, world: str = "tones") -> Evaluation:
    """Evaluate the samples in a folder from another program."""
    folders = ["--samples", str(tmp_path / "samples"), "--output", str(tmp_path / "out")]
    assert main(["evaluate", world, *folders]) == 0
    return load_evaluation(tmp_path / "out")


def write_listing(folder: Path, texts: list[str], suffix: str) -> list[Path]:
    """Create a folder with the prompts.jsonl of files numbered from 0, and return their paths."""
    folder.mkdir()
    names = [f"{number}.{suffix}" for number in range(len(texts))]
    rows = [json.dumps({"file_name": name, "prompt": text}) for name, text in zip(names, texts, strict=True)]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return [folder / name for name in names]


def write(folder: Path, texts: list[str], clips: Tensor, rate: int = 8000, suffix: str = "wav") -> None:
    for path, clip in zip(write_listing(folder, texts, suffix), clips.numpy(), strict=True):
        soundfile.write(path, clip.T, rate, subtype="PCM_16")


def test_prompt_sources_of_the_tones_world() -> None:
    assert prompt_set("tones:comp") == tones.prompts("comp")
    assert set(prompt_set("tones:train:counting,pitch").by_task()) == {"counting", "pitch"}
    assert len(prompt_set("tones:iid").by_task()) == 7
    world = world_of("tones:val")
    assert world is not None and world.verifier == "tones-1" and world_of("tones.txt") is None


def test_a_model_is_evaluated(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    arguments = [
        "--model.path",
        str(model),
        "--output",
        str(output),
        "--prompts",
        "tones:len",
        "--sampling.num_steps",
        "2",
    ]
    assert main(["evaluate", "tones", *arguments, "--samples_per_task", "2", "--seeds", "1"]) == 0
    evaluation = load_evaluation(output)
    assert (evaluation.protocol.verifier, evaluation.protocol.suite) == ("tones-1", "len")
    assert evaluation.score_names == ("strict", "partial", "relaxed") and len(evaluation.records) == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("overall")  # the only task has no line of its own
    assert "strict 0.000 (0.000 to 0.842)" in printed[0] and printed[-1] == f"report: {output / 'report.html'}"
    page = (output / "report.html").read_text()
    assert "Strict score on len" in page and page.count("<audio") == 2
    clip, rate = soundfile.read(output / str(evaluation.records[0].image))
    assert rate == 8000 and clip.shape == (12000,)


def test_clips_from_another_program_are_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, clips = render(per_task=2, wrong=1)
    write(tmp_path / "samples", texts, clips)
    evaluation = evaluate(tmp_path)
    assert evaluation.protocol.kernel == EXTERNAL and evaluation.protocol.suite == "samples"
    strict = {task: estimates["strict"].mean for task, estimates in evaluation.tasks.items()}
    assert strict == dict.fromkeys(tones.prompts("comp").by_task(), 0.5)
    assert "overall       strict 0.500 (" in capsys.readouterr().out
    assert [record.sample for record in evaluation.records] == [0] * len(texts)


def test_other_rates_channels_and_lengths_are_converted_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stereo FLAC files at 44.1 kHz that end early get full scores."""
    texts, clips = render(per_task=1)
    early = clips[:, :, : int(clips.abs().amax((0, 1)).nonzero()[-1]) + 1]
    upsampled = resample(early, 8000, 44100).repeat(1, 2, 1)
    write(tmp_path / "samples", texts, upsampled, rate=44100, suffix="flac")
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert evaluate(tmp_path).overall["strict"].mean == 1.0
    assert "waveforms at 44100 Hz are resampled" in caplog.text and "the mean of 2 is taken" in caplog.text


def test_a_short_clip_is_padded_with_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    warn_once.cache_clear()
    soundfile.write(tmp_path / "a.wav", np.full(4000, 0.1), 8000)
    with caplog.at_level(logging.WARNING):
        clip = WORLDS["tones"].read(tmp_path / "a.wav")
    assert clip.shape == (1, 12000) and not clip[0, 4000:].any() and clip[0, 3999] > 0.09
    assert "clips of the tones world last 1.5 s: shorter ones" in caplog.text


def test_invalid_folders_are_refused(tmp_path: Path, error: Callable[..., str]) -> None:
    folder, output = tmp_path / "samples", str(tmp_path / "out")
    command = ["evaluate", "tones", "--samples", str(folder), "--output", output]
    assert "prompts.jsonl is missing: write a line with file_name and prompt for each sample" in error(*command)
    write(folder, ["a sine tone"], torch.zeros(1, 1, 12000))
    listing = folder / "prompts.jsonl"
    for line, message in (
        ('{"file_name": "0.wav"}', 'line 1: expected an object with "file_name" and "prompt"'),
        ('{"file_name": "0.wav", "prompt": "a bell"}', "'a bell' is not a prompt of the tones world"),
        ('{"file_name": "../0.wav", "prompt": "a sine tone"}', "leads out of"),
        ('{"file_name": "1.wav", "prompt": "a sine tone"}', "1.wav, which"),
        ("", "has no samples to evaluate: list at least one"),
    ):
        listing.write_text(line + "\n")
        assert message in error(*command)
    listing.write_text('{"file_name": "0.wav", "prompt": "a sine tone"}\n')
    assert not Path(output).exists()
    soundfile.write(folder / "0.wav", np.zeros(16000), 8000)
    assert "lasts 2.00 s: clips of the tones world last 1.5 s; cut it" in error(*command)
    broken = np.zeros(12000, np.float32)
    broken[5] = np.nan
    soundfile.write(folder / "0.wav", broken, 8000, subtype="FLOAT")
    assert "0.wav holds NaN or infinite samples: leave it out" in error(*command[:-1], f"{output}-2")
    assert not Path(f"{output}-2", "summary.json").exists()


def test_images_from_another_program_are_evaluated_in_the_shapes_world(tmp_path: Path) -> None:
    world = WORLDS["shapes"]
    prompts = world.prompts("iid").prompts[:3]
    images = world.render([prompt.metadata or {} for prompt in prompts], np.random.default_rng(0))
    save_images(images, write_listing(tmp_path / "samples", [prompt.text for prompt in prompts], "png"))
    assert evaluate(tmp_path, "shapes").overall["strict"].mean == 1.0


def test_rewards_and_features_of_another_sample_rate_are_refused() -> None:
    clap = ClapReward("tones-clap", 48000)
    require_rate({"clap": clap, "level": LevelWithin()}, 48000)
    require_rate({"clap": clap}, None)  # for images
    gated = Gate(LevelWithin(), PerSampleFrechetReward(LogMelFeatures(8000, mels=8), torch.randn(9, 8)), 0.0)
    recipe = dragon_set(VendiReward(), FrameFeatures(LogMelFeatures(16000)))
    for settings, rate, message in (
        ({"clap": clap}, 8000, r"^clap expects waveforms at 48000 Hz, but gets 8000 Hz: set its sample_r"),
        ({"partial": TonesReward()}, 16000, r"^partial expects waveforms at 8000 Hz, but gets 16000"),
        ({"quiet": gated}, 44100, r"^quiet\.condition\.encoder expects waveforms at 8000 Hz"),
        ({"recipe": recipe}, 8000, r"^recipe\.features\.encoder expects waveforms at 16000 Hz, but gets 8000"),
    ):
        with pytest.raises(ValueError, match=message):
            require_rate(settings, rate)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_training_refuses_rewards_of_another_sample_rate(
    command: str, model: Path, tmp_path: Path, error: Callable[..., str]
) -> None:
    reward = "{class_path: rewards.clap.ClapReward, init_args: {model: tones-clap, sample_rate: 44100}}"
    base = ["--config", str(CONFIGS / "compare" / "base_tones.yaml"), "--output", str(tmp_path / "x")]
    settings = [*base, "--model.path", str(model), "--reward_hacking.rewards", f"{{clap: {reward}}}"]
    message = "reward_hacking.rewards.clap expects waveforms at 44100 Hz, but gets 8000 Hz: set its sample_rate to"
    assert message in error(command, *settings)
    assert not (tmp_path / "x").exists()


def test_a_model_of_another_medium_is_refused(
    model: Path, tiny_folder: Path, tmp_path: Path, error: Callable[..., str]
) -> None:
    small = ["--samples_per_task", "1", "--seeds", "1", "--output", str(tmp_path / "out")]
    message = error("evaluate", "tones", "--model.path", str(tiny_folder), *small)
    assert "the verifier of 'tones:comp' expects waveforms at 8000 Hz, but this model generates" in message
    message = error("evaluate", "shapes", "--model.path", str(model), "--sampling.sigmas", "null", *small)
    assert "the verifier of 'shapes:comp' expects images, but this model generates waveforms at 8000 Hz" in message


def test_the_error_for_a_missing_embedded_model_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[..., str]
) -> None:
    monkeypatch.setattr(assets, "names", lambda: ["shapes-clip", "shapes-sd3"])
    for command in (["evaluate", "tones"], ["demo", "tones"]):
        message = error(*command, "--output", str(tmp_path / "out"))
        assert "the embedded model tones-audio is not in this installation: make it with python scripts/" in message
    with pytest.raises(FileNotFoundError, match=r"tones_audio\.py clap in a checkout of the repository"):
        assets.resolve("tones-clap")
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tones-clap").mkdir()
    assert assets.resolve("tones-clap") == "tones-clap"


def test_the_tones_demo_trains_a_model(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--training.rounds 1 --training.prompts_per_round 2 --training.group_size 2 --training.batch_size 4"
    small += " --training.updates_per_round 1 --lora.rank 2 --held_out.every 0"
    small += " --before_after.samples_per_task 1 --before_after.seeds 1 --before_after.prompts tones:comp"
    arguments = ["--output", str(tmp_path / "run"), "--model.path", str(model), *small.split()]
    assert main(["demo", "tones", *arguments]) == 0
    after = load_evaluation(tmp_path / "run" / "after")
    assert after.protocol.verifier == "tones-1" and len(after.records) == len(tones.prompts("comp").by_task())
    assert after.score_names == ("strict", "partial", "relaxed")
    assert "overall: partial" in capsys.readouterr().out
    assert (tmp_path / "run" / "lora").is_dir() and "tones-1" in (tmp_path / "run" / "report.html").read_text()
    assert evaluation_diversity(tmp_path / "run" / "after") == {}


def test_rewards_are_checked_on_rendered_clips(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--samples", "tones:val", "--count", "5", "--expected.prompts", "true"]
    assert main(["reward", "check", "rewards.tones:TonesReward", *arguments]) == 0
    assert "every check passed" in capsys.readouterr().out


def test_reward_commands_refuse_another_sample_rate(tmp_path: Path, error: Callable[..., str]) -> None:
    texts, clips = render(per_task=1)
    write(tmp_path / "samples", texts, clips, rate=16000)
    check = ["reward", "check", "rewards.tones:TonesReward", "--samples", str(tmp_path / "samples")]
    assert "reward expects waveforms at 8000 Hz, but gets 16000" in error(*check)
    soundfile.write(tmp_path / "samples" / "1.wav", clips[1, 0].numpy(), 8000)
    assert "differ in size or sample rate" in error(*check)
    message = error("serve", "rewards.tones:TonesReward", "--sample_rate", "44100")
    assert "reward expects waveforms at 8000 Hz, but gets 44100" in message
