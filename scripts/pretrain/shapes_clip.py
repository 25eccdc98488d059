"""Train the embedded image-text model from nothing: an open_clip folder that opens as ``local-dir:PATH``.

    python scripts/pretrain/shapes_clip.py --output genalign/assets/shapes-clip --work runs/pretrain-clip

Trained on honest captions of the shapes world's train split; seeded, resumable from ``--work``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from genalign.runtime.files import write_json, write_text
from scripts.pretrain.shapes_dataset import CaptionedScenes, captioned_scenes
from scripts.pretrain.shapes_tokenizers import CLIP_LENGTH, clip_tokenizer
from scripts.pretrain.training_loop import Fit, contrastive, fit

SCENES = 40_000
SETTINGS = Fit(steps=1400, learning_rate=1e-3, muon=0.02)
BATCH = 128
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def model_config() -> dict[str, object]:
    """open_clip's own configuration: ViT on 8 px patches, a causal text transformer pooled at the end token."""
    tokenizer = clip_tokenizer()
    vision = {"image_size": 64, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8}
    text = {
        "context_length": CLIP_LENGTH,
        "vocab_size": len(tokenizer),
        "hf_tokenizer_name": "shapes-clip",
        "width": 128,
        "heads": 4,
        "layers": 3,
        "pool_type": "eos",
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
    }
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"}
    return {"model_cfg": {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": preprocess}


def write_folder(folder: Path) -> None:
    """Configuration and tokenizer; the weights come after training."""
    write_json(folder / "open_clip_config.json", model_config())
    clip_tokenizer().save_pretrained(str(folder))


def build(folder: Path) -> nn.Module:
    """The model of the configuration in ``folder``, untrained unless weights are there."""
    return open_clip.create_model(f"local-dir:{folder}", load_weights=(folder / "open_clip_model.safetensors").exists())


def train(data: CaptionedScenes, model: nn.Module, tokens: Tensor, work: Path, device: str) -> None:
    """The symmetric contrastive loss; two samples of a batch with the same caption are both right."""
    mean, std = (torch.tensor(values).view(3, 1, 1).to(device) for values in (MEAN, STD))
    _, caption = tokens.unique(dim=0, return_inverse=True)
    model.to(device)

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        index = torch.randint(len(tokens), (BATCH,), generator=generator)
        images = data.images[index].to(device).float() / 255
        images = (images + 0.03 * torch.randn(images.shape, generator=generator).to(device) - mean) / std
        with torch.autocast(device, torch.bfloat16):
            image, text, scale = model(images, tokens[index].to(device))[:3]
        logits = scale.float() * image.float() @ text.float().T
        return contrastive(logits, logits.T, caption[index].to(device))

    blocks = (*model.visual.transformer.parameters(), *model.transformer.parameters())
    fit(model, loss, SETTINGS, work / "clip.safetensors", tuple(p for p in blocks if p.ndim == 2))
    model.eval().cpu()


@torch.no_grad()
def retrieval(model: nn.Module, data: CaptionedScenes, tokenizer: object) -> float:
    """Share of images whose caption ranks first among 64 distinct captions, over batches of held-out scenes."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    first = {prompt.text: i for i, prompt in reversed(list(enumerate(data.prompts)))}
    rows = list(first.values())
    hits = []
    for begin in range(0, len(rows) - 63, 64):
        batch = rows[begin : begin + 64]
        image = model.encode_image((data.images[batch].float() / 255 - mean) / std, normalize=True)
        text = model.encode_text(tokenizer([data.prompts[i].text for i in batch]), normalize=True)
        hits.append(((image @ text.T).argmax(1) == torch.arange(64)).float().mean())
    return float(torch.stack(hits).mean())


def main() -> None:
    """Train the embedded CLIP model of the shapes world and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("genalign/assets/shapes-clip"))
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain-clip"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder))
        model = build(Path(folder))
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    data = captioned_scenes(SCENES, seed=10)
    train(data, model, tokenizer([prompt.text for prompt in data.prompts]), options.work, options.device)
    score = retrieval(model, captioned_scenes(4000, seed=11), tokenizer)
    write_folder(options.output)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, options.output / "open_clip_model.safetensors")
    write_text(options.output / "README.md", CARD.format(score=score, steps=SETTINGS.steps, scenes=SCENES))
    print(f"image-to-text retrieval among 64 distinct captions: {score:.3f}")


CARD = """---
license: apache-2.0
library_name: open_clip
---
# shapes-clip

A small open_clip model (64 px ViT, causal text transformer, 128-dimensional embedding) of genalign's shapes world,
trained from scratch by `scripts/pretrain/shapes_clip.py`: {steps} steps on {scenes} rendered scenes with true captions.

    open_clip.create_model_and_transforms("local-dir:PATH")
    open_clip.get_tokenizer("local-dir:PATH")

Image-to-text retrieval among 64 distinct captions on new scenes: {score:.3f}
(`python scripts/pretrain/shapes_clip.py` prints it). It has never seen the held-out shape and colour pairs. Made for
experiments, not for photographs.
"""


if __name__ == "__main__":
    main()
