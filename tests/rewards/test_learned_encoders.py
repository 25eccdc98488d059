"""Encoders of learned rewards, on tiny random checkpoints: what they compute, train and share, and reloaded rewards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from genalign.reward_learning.encoding import ItemTokens, LiveTokens, StoredTokens
from genalign.reward_learning.examples import Examples, Grades, Item, Pairs
from genalign.reward_learning.fitting import FitSettings
from genalign.reward_learning.heads import AttentionHead, IdentityHead, LinearHead, MLPHead
from genalign.reward_learning.laplace import laplace_posteriors
from genalign.reward_learning.network import HeadShape, RewardEncoder
from genalign.reward_learning.objective import RewardData, RewardObjective, nothing_held_out
from genalign.reward_learning.preference_losses import BradleyTerryLoss
from genalign.reward_learning.preferences import JudgedSample
from genalign.reward_learning.reward_file import REWARD, RewardDescription, RewardFile, save_reward
from genalign.reward_learning.training import RewardFit, RewardTraining, build_network
from genalign.reward_learning.uncertainty import LastLayerLaplace
from genalign.runtime.files import load_state, save_state
from genalign.runtime.media import AudioMedium, write_samples
from genalign.types import Prompt, Reward
from genalign.worlds.tones import SAMPLE_RATE
from rewards.backbones.clip_encoder import load_clip
from rewards.backbones.siglip_encoder import load_siglip
from rewards.learned import LearnedReward
from rewards.learned_encoders import ClapTokens, ClipTokens, DinoTokens, SiglipTokens, YesTokenLogits
from rewards.vqa import YesNoModel, load_model
from tests.rewards import tiny_clap, tiny_detectors
from tests.rewards.test_vqa import TEMPLATE, WORDS, save_llava, save_qwen, words_tokenizer

TEXTS = ["red circle", "two squares", "is there a red circle", "red"]
PROMPTS = [Prompt(text) for text in TEXTS]


def save_siglip(folder: Path) -> Path:
    """A tiny random SigLIP for 28 x 28 images, four patches."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = words_tokenizer(WORDS, ["<image>"])
    text = SiglipTextConfig(vocab_size=len(WORDS), max_position_embeddings=8, pad_token_id=1, **tower)
    vision = SiglipVisionConfig(image_size=28, patch_size=14, **tower)
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).save_pretrained(folder)
    words.save_pretrained(str(folder))
    SiglipImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def save_dino(folder: Path, version: int) -> Path:
    """A tiny random DINOv2 or DINOv3, with register tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if version == 2:
        Dinov2Model(Dinov2Config(image_size=28, patch_size=14, **sizes)).save_pretrained(folder)
    else:
        config = DINOv3ViTConfig(image_size=32, patch_size=16, num_register_tokens=3, **sizes)
        DINOv3ViTModel(config).save_pretrained(folder)
        DINOv3ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


MAKERS: dict[str, Callable[[Path], RewardEncoder]] = {
    "clip": lambda folder: ClipTokens(tiny_detectors.clip(folder), tokens="parts"),
    "open_clip": lambda folder: ClipTokens("shapes-clip"),
    "clip blocks": lambda folder: ClipTokens(tiny_detectors.clip(folder), blocks=1),
    "clip lora": lambda folder: ClipTokens(tiny_detectors.clip(folder), lora_rank=2),
    "open_clip lora": lambda folder: ClipTokens("shapes-clip", lora_rank=2),
    "siglip": lambda folder: SiglipTokens(str(save_siglip(folder)), tokens="parts"),
    "siglip lora": lambda folder: SiglipTokens(str(save_siglip(folder)), lora_rank=2),
    "dinov2": lambda folder: DinoTokens(str(save_dino(folder, 2)), tokens="parts"),
    "dinov3": lambda folder: DinoTokens(str(save_dino(folder, 3)), text="shapes-clip", tokens="parts"),
    "dinov2 blocks": lambda folder: DinoTokens(str(save_dino(folder, 2)), blocks=1),
    "clap": lambda folder: ClapTokens(str(tiny_clap.write_clap(folder)), tiny_clap.RATE, tokens="parts"),
    "clap lora": lambda folder: ClapTokens(str(tiny_clap.write_clap(folder)), tiny_clap.RATE, lora_rank=2),
    "tones-clap": lambda folder: ClapTokens("tones-clap", SAMPLE_RATE),
    "llava": lambda folder: YesTokenLogits(str(save_llava(folder, WORDS, TEMPLATE)), ["is {prompt} red"], lora_rank=2),
    "qwen2-vl": lambda folder: YesTokenLogits(str(save_qwen(folder)), ["is {prompt} red", "two squares"], lora_rank=2),
}


def samples_for(encoder: RewardEncoder, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if encoder.sample_rate is not None:
        return 0.3 * torch.randn(count, 1, encoder.sample_rate // 2, generator=generator)
    return torch.rand(count, 3, 40, 40, generator=generator)


def data_for(encoder: RewardEncoder, samples: Tensor, folder: Path, dimensions: tuple[str, ...]) -> RewardData:
    """Pairs of the first two and the last two samples, of which the first wins."""
    medium = None if encoder.sample_rate is None else AudioMedium(encoder.sample_rate)
    files = [folder / name for name in write_samples(samples, folder, 0, medium)]
    items = tuple(Item(prompt, JudgedSample(file), file.name) for prompt, file in zip(PROMPTS, files, strict=True))
    rows, preferred = torch.tensor([[0, 1], [2, 3]]), torch.ones(2, len(dimensions))
    grades = Grades(torch.empty(0, dtype=torch.long), torch.empty(0, len(dimensions)), ())
    training = Examples(items, dimensions, Pairs(rows, preferred, preferred, ("", "")), grades)
    tokens: ItemTokens = LiveTokens(encoder, items, torch.empty(len(items), 0))
    if not any(weight.requires_grad for weight in encoder.parameters()):
        with torch.no_grad():
            tokens = StoredTokens(tokens.tokens(torch.arange(len(items))), tokens.nuisances)
    return RewardData(training, nothing_held_out(training), tokens)


@pytest.mark.parametrize("name", MAKERS)
def test_a_reward_on_every_encoder_is_trained_saved_and_reloaded(name: str, tmp_path: Path) -> None:
    encoder = MAKERS[name](tmp_path / "model")
    samples, dimensions = samples_for(encoder), ("overall", "detail")[: min(encoder.width, 2)]
    shape: HeadShape = AttentionHead(2, 4) if "parts" in encoder.arguments.values() else MLPHead(8)
    shape = IdentityHead() if isinstance(encoder, YesTokenLogits) else shape
    data = data_for(encoder, samples, tmp_path, dimensions)
    network = build_network(encoder, shape, len(dimensions), 1, 0)
    fit = RewardFit(epochs=3, batch_size=2, optimizer=FitSettings(learning_rate=0.01))
    losses = [
        metrics["loss"] for metrics in RewardTraining(network, data, RewardObjective(BradleyTerryLoss()), fit).run()
    ]
    assert losses[-1] < losses[0]
    save_reward(tmp_path / REWARD, network, RewardDescription.of(network, shape, dimensions, ()), [])
    for network.output, dimension in enumerate(dimensions):
        reward = LearnedReward(tmp_path, dimension)
        with torch.no_grad():
            expected = network(samples, PROMPTS)
        assert torch.equal(reward(samples, PROMPTS), expected) and expected.shape == (4,) and expected.std() > 0
    assert reward.sample_rate == encoder.sample_rate and reward.network().sample_tower


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_have_a_gradient_in_samples_and_in_what_is_trained_alone(name: str, tmp_path: Path) -> None:
    encoder = MAKERS[name](tmp_path)
    samples = samples_for(encoder).requires_grad_(True)
    tokens = encoder(samples, PROMPTS)
    assert tokens.dtype == torch.float32 and tokens.shape[0] == 4 and tokens.shape[2] == encoder.width
    trained = {name: weight for name, weight in encoder.named_parameters() if weight.requires_grad}
    assert bool(trained) == any(word in name for word in ("blocks", "lora", "llava", "qwen"))
    weighed = (tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))).sum()
    gradients = torch.autograd.grad(weighed, [samples, *trained.values()], allow_unused=True)
    assert gradients[0] is not None and gradients[0].isfinite().all() and gradients[0].abs().sum() > 0
    if trained:  # LoRA starts with one of its factors at 0, so that half of the gradients are 0
        assert sum(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients[1:]) > 0
    alone = encoder(samples[1:2], PROMPTS[1:2])
    torch.testing.assert_close(alone, tokens[1:2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["open_clip lora", "dinov2 blocks", "llava"])
def test_a_trained_encoder_learns_from_images_of_several_sizes(name: str, tmp_path: Path) -> None:
    encoder, generator = MAKERS[name](tmp_path / "model"), torch.Generator().manual_seed(0)
    files = list[Path]()
    for place, size in enumerate(((40, 40), (56, 48), (40, 40), (40, 40))):
        folder = tmp_path / str(place)
        files += [folder / name for name in write_samples(torch.rand(1, 3, *size, generator=generator), folder, 0)]
    items = [Item(prompt, JudgedSample(file), str(file)) for prompt, file in zip(PROMPTS, files, strict=True)]
    live = LiveTokens(encoder, items, torch.empty(4, 0), batch_size=2)
    tokens = live.tokens(torch.arange(4))
    alone = [encoder(item.sample.read()[None], [item.prompt]) for item in items]
    torch.testing.assert_close(tokens, torch.cat(alone), rtol=0, atol=1e-4)
    trained = [weight for weight in encoder.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(tokens[1].square().sum(), trained, allow_unused=True)  # of the other size
    assert any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_pooled_tokens_mix_the_units_of_sample_and_text() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    frozen = load_clip("shapes-clip")
    u = torch.nn.functional.normalize(frozen(images), dim=-1)
    t = frozen.text(TEXTS[:2])
    tokens = ClipTokens("shapes-clip")(images, PROMPTS[:2])
    torch.testing.assert_close(tokens, torch.cat([u, t, u * t, (u - t).square()], 1)[:, None])
    parts = ClipTokens("shapes-clip", tokens="parts")(images, PROMPTS[:2])
    assert parts.shape == (2, 65, 512)
    torch.testing.assert_close(parts[:, :1], tokens)


def test_what_is_trained_changes_no_shared_weight(tmp_path: Path) -> None:
    model = tiny_detectors.clip(tmp_path)
    frozen = load_clip(model)
    before = copy.deepcopy(frozen.state_dict())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = frozen(images)
    for encoder in (ClipTokens(model, blocks=1), ClipTokens(model, lora_rank=2)):
        torch.testing.assert_close(encoder.encoder(images), expected, rtol=0, atol=1e-6)
        trained = [weight for weight in encoder.parameters() if weight.requires_grad]
        with torch.no_grad():
            for weight in trained:
                weight.add_(1.0)
        assert not torch.allclose(encoder.encoder(images), expected)
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert not any(weight.requires_grad for weight in frozen.parameters())
    with pytest.raises(ValueError, match="blocks must be at most 1"):
        ClipTokens(model, blocks=3)
    with pytest.raises(ValueError, match="not both"):
        ClipTokens(model, blocks=1, lora_rank=1)
    with pytest.raises(ValueError, match='tokens must be "pooled" or "parts"'):
        ClipTokens(model, tokens="patches")  # type: ignore[arg-type]


def test_siglip_agrees_with_transformers(tmp_path: Path) -> None:
    folder = save_siglip(tmp_path)
    model = SiglipModel.from_pretrained(folder).eval()
    encoder = load_siglip(str(folder))
    images = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    tokens = words_tokenizer(WORDS, ["<image>"])(TEXTS[:2], padding="max_length", max_length=8, return_tensors="pt")
    with torch.no_grad():
        output = model(input_ids=tokens.input_ids, pixel_values=2 * images - 1)
    torch.testing.assert_close(
        torch.nn.functional.normalize(encoder(images), dim=-1), output.image_embeds, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(encoder.text(TEXTS[:2]), output.text_embeds, rtol=0, atol=1e-5)


def test_the_log_odds_are_those_of_the_yes_no_model(tmp_path: Path) -> None:
    folder = str(save_llava(tmp_path, WORDS, TEMPLATE))
    questions = ["is there a red circle ? Answer with yes or no."] * 2
    images = (torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    expected = YesNoModel(folder)(images, questions)
    encoder = YesTokenLogits(folder, ["is there a {prompt} ? Answer with yes or no."], lora_rank=0)
    odds = encoder(images, [Prompt("red circle")] * 2)
    assert not any(weight.requires_grad for weight in encoder.parameters())
    torch.testing.assert_close(odds[:, 0, 0].sigmoid(), expected, rtol=0, atol=1e-4)
    lora = YesTokenLogits(folder, lora_rank=2)
    names = [name for name, weight in lora.named_parameters() if weight.requires_grad]
    assert names and not any("vision" in name or "lm_head" in name or "projector" in name for name in names)
    assert not any(weight.requires_grad for weight in load_model(folder, "float32")[0].parameters())


def test_wrong_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a clip checkpoint: give a DINOv2 or DINOv3"):
        DinoTokens(tiny_detectors.clip(tmp_path / "clip"))
    with pytest.raises(ValueError, match="not SigLIP"):
        SiglipTokens(tiny_detectors.clip(tmp_path / "clip"))
    with pytest.raises(ValueError, match="size 30 is not a multiple of the patch size 14: try 28"):
        DinoTokens(str(save_dino(tmp_path / "dino", 2)), size=30)
    with pytest.raises(ValueError, match="one question or more"):
        YesTokenLogits("any", [])


# The reward


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An ensemble of two dimensions on shapes-clip."""
    encoder = ClipTokens("shapes-clip")
    network = build_network(encoder, LinearHead(), 2, 3, 0)
    network.token_scale.fill_(0.1)
    network.level.copy_(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    save_reward(tmp_path / REWARD, network, RewardDescription.of(network, LinearHead(), ("a", "b"), ()), [])
    return tmp_path


def test_a_learned_reward_selects_a_dimension_and_pools_members(saved: Path) -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reward, prompts = LearnedReward(saved, "b"), PROMPTS[:3]
    assert isinstance(reward, Reward)
    network = reward.network()
    members = network.outputs(network.encoder(images, prompts))[..., 1]
    torch.testing.assert_close(reward(images, prompts), members.mean(1))
    torch.testing.assert_close(LearnedReward(saved, "b", "min")(images, prompts), members.min(1).values)
    deviation = members.std(1, correction=0)
    careful = LearnedReward(saved, "b", "mean_minus_std")(images, prompts)
    torch.testing.assert_close(careful, members.mean(1) - deviation)
    torch.testing.assert_close(reward.uncertainty(images, prompts), deviation)
    assert not torch.allclose(LearnedReward(saved)(images, prompts), reward(images, prompts))
    with pytest.raises(ValueError, match="has no dimension 'c': give one of a, b"):
        LearnedReward(saved, "c")(images, prompts)


def test_pools_that_compare_members_warn_where_their_prompts_have_no_common_origin(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = torch.zeros(1, 3, 64, 64)
    LearnedReward(saved, pool="mean")(images, PROMPTS[:1])
    assert not caplog.records
    for _ in range(2):
        LearnedReward(saved).uncertainty(images, PROMPTS[:1])
    assert "and the uncertainty mostly follows these constants" in caplog.records.pop().getMessage()
    assert not caplog.records  # it is said once
    for pool in ("min", "mean_minus_std"):
        LearnedReward(saved, pool=pool)(images, PROMPTS[:1])
        assert "was trained without Centering" in caplog.records.pop().getMessage()
    tensors, meta = load_state(saved / REWARD)
    save_state(tmp_path / "centered.safetensors", tensors, {**meta, "centered": True})
    LearnedReward(tmp_path / "centered.safetensors", pool="min")(images, PROMPTS[:1])
    LearnedReward(tmp_path / "centered.safetensors").uncertainty(images, PROMPTS[:1])
    assert not caplog.records


def test_the_score_is_the_overall_dimension_by_default(saved: Path, tmp_path: Path) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tensors, meta = load_state(saved / REWARD)
    save_state(tmp_path / "overall.safetensors", tensors, {**meta, "dimensions": ["a", "overall"]})
    torch.testing.assert_close(
        LearnedReward(tmp_path / "overall.safetensors")(images, PROMPTS[:2]),
        LearnedReward(saved, "b")(images, PROMPTS[:2]),
    )


def test_an_encoder_that_changed_on_the_disk_is_refused(tmp_path: Path) -> None:
    encoder = SiglipTokens(str(save_siglip(tmp_path / "siglip")))
    network = build_network(encoder, LinearHead(), 1, 1, 0)
    save_reward(tmp_path / REWARD, network, RewardDescription.of(network, LinearHead(), ("overall",)), [])
    images = torch.rand(1, 3, 28, 28)
    changed = SiglipTokens(str(tmp_path / "siglip"))
    changed.encoder = copy.deepcopy(changed.encoder)
    next(iter(changed.encoder.parameters())).data.add_(1e-3)
    with pytest.raises(ValueError, match="has other weights than in training"):
        LearnedReward(tmp_path, encoder=changed)(images, PROMPTS[:1])
    assert LearnedReward(tmp_path)(images, PROMPTS[:1]).isfinite().all()


def test_samples_that_cannot_be_scored(saved: Path) -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole = LearnedReward(saved)(images, PROMPTS[:3])
    images[1, 0, 5, 5] = torch.nan
    images.requires_grad_(True)
    reward = LearnedReward(saved)
    scores = reward(images, PROMPTS[:3])
    assert scores.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(scores[[0, 2]], whole[[0, 2]])
    (gradient,) = torch.autograd.grad(scores[0] + scores[2], images)
    assert gradient[[0, 2]].abs().sum() > 0 and gradient.isfinite().all()
    assert reward.uncertainty(images.detach(), PROMPTS[:3]).isnan().tolist() == [False, True, False]
    with pytest.raises(
        ValueError, match=r"is a reward of images \(B, 3, H, W\), not of samples of shape \(2, 1, 800\)"
    ):
        reward(torch.zeros(2, 1, 800), PROMPTS[:2])


def test_a_reward_with_a_posterior_has_an_uncertainty(tmp_path: Path) -> None:
    encoder = ClipTokens("shapes-clip")
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    data = data_for(encoder, images, tmp_path, ("overall",))
    network = build_network(encoder, LinearHead(), 1, 1, 0)
    training = RewardTraining(network, data, RewardObjective(BradleyTerryLoss()), RewardFit(epochs=2))
    list(training.run())
    description = RewardDescription.of(network, LinearHead(), ("overall",), ())
    save_reward(tmp_path / REWARD, network, description, [])
    with pytest.raises(ValueError, match="has one member and no posterior"):
        LearnedReward(tmp_path).uncertainty(images, PROMPTS)
    with pytest.raises(ValueError, match=r"or train it with fit\.members of 2 or more, or with uncertainty"):
        LearnedReward(tmp_path, pool="mean_minus_std")(images, PROMPTS)
    save_reward(tmp_path / REWARD, network, description, laplace_posteriors(training, LastLayerLaplace(1.0)))
    deviation = LearnedReward(tmp_path).uncertainty(images, PROMPTS)
    assert deviation.shape == (4,) and (deviation > 0).all()
    pixels = images.clone().requires_grad_(True)
    scores = LearnedReward(tmp_path, pool="mean_minus_std")(pixels, PROMPTS)
    torch.testing.assert_close(scores, LearnedReward(tmp_path)(images, PROMPTS) - deviation)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    with pytest.raises(ValueError, match="pool 'min' compares the members of an ensemble, and this reward has one"):
        LearnedReward(tmp_path, pool="min")(images, PROMPTS)
    assert RewardFile.read(tmp_path).posteriors[0].precision == 1.0


def test_files_of_other_things_are_refused(saved: Path, tmp_path: Path) -> None:
    images = torch.zeros(1, 3, 64, 64)
    with pytest.raises(FileNotFoundError, match="train a reward with genalign reward train"):
        LearnedReward(tmp_path / "none")(images, PROMPTS[:1])
    tensors, meta = load_state(saved / REWARD)
    for change in ({"format": "another"}, {"head": "os.system"}):
        save_state(tmp_path / "other.safetensors", tensors, {**meta, **change})
        with pytest.raises(ValueError, match="is not a learned reward"):
            LearnedReward(tmp_path / "other.safetensors")(images, PROMPTS[:1])
    save_state(tmp_path / "other.safetensors", tensors, {**meta, "encoder": "os.system"})
    with pytest.raises(ValueError, match=r"trained on os\.system, which is no encoder of rewards.learned_encoders"):
        LearnedReward(tmp_path / "other.safetensors")(images, PROMPTS[:1])
    save_state(tmp_path / "other.safetensors", {name: t for name, t in tensors.items() if "bias" not in name}, meta)
    with pytest.raises(ValueError, match="do not fit the encoder"):
        LearnedReward(tmp_path / "other.safetensors")(images, PROMPTS[:1])
    own = LearnedReward(saved, encoder=ClipTokens("shapes-clip"))
    torch.testing.assert_close(own(images, PROMPTS[:1]), LearnedReward(saved)(images, PROMPTS[:1]))
