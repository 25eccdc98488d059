"""Embeddings that are encoded ahead into files, text encoders that are dropped, and runs that read them."""

from __future__ import annotations

import json
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import pipelines
from genalign.cli.main import main
from genalign.diffusion.policy import Lora, Policy
from genalign.runtime.distributed import RankShare
from genalign.types import Conditioning
from pipelines import SD3, text_cache
from pipelines.base import DiffusersPipeline
from pipelines.text_cache import DroppedEncoders, TextCache
from tests.pipelines.tiny_checkpoints import FAMILIES

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers, in schedulers
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),  # diffusers, in the autoencoder of audio
]
FolderOf = Callable[[str], Path]
PROMPTS = ["a red circle", "an orange ring and a blue square"]


def _open(folder: Path, cache: Path, **options: Any) -> SD3:
    return SD3.load(folder, text_cache=str(cache), **options)


def _equal(first: Conditioning, second: Conditioning) -> bool:
    return all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


def _folder(pipeline: DiffusersPipeline) -> Path:
    assert isinstance(pipeline._embeddings, TextCache)
    return pipeline._embeddings.folder


def _files(pipeline: DiffusersPipeline) -> list[Path]:
    return sorted(path for path in _folder(pipeline).iterdir())


def _prediction(pipeline: DiffusersPipeline, prompts: list[str]) -> Tensor:
    x, step = pipeline.initial_noise([1, 2]), pipeline.grid(4)[1]
    guidance = 1.0 if pipeline.is_distilled else 3.0
    with torch.no_grad():
        return pipeline.predict(x, step, pipeline.encode(prompts), guidance)


def test_embeddings_are_those_of_the_encoders_which_are_gone(
    tiny: SD3, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, alive = _open(tiny_folder, tmp_path), list[weakref.ref[Any]]()
    assert cached.pipe.text_encoder is None and cached.pipe.text_encoder_3 is None
    encode = cached.encode_texts

    def encode_texts(texts: list[str]) -> dict[str, Tensor]:
        alive.extend(weakref.ref(cached.pipe.components[name]) for name in cached.encoders)
        alive.extend(weakref.ref(weight) for weight in cached.pipe.text_encoder_3.parameters())
        return encode(texts)

    monkeypatch.setattr(cached, "encode_texts", encode_texts)
    cached.encode_ahead(PROMPTS)
    assert len(alive) > 5 and not any(reference() for reference in alive)
    assert all(cached.pipe.components[name] is None for name in cached.encoders)
    assert len(_files(cached)) == 3  # the text of guidance, too
    assert _equal(cached.encode(PROMPTS), tiny.encode(PROMPTS))
    assert torch.equal(_prediction(cached, PROMPTS), _prediction(tiny, PROMPTS))
    with pytest.raises(
        ValueError, match=r"'a third' is not in the text cache .* are not loaded: leave model.text_cache"
    ):
        cached.encode(["a third"])


def test_a_pipeline_whose_texts_are_in_the_cache_loads_no_encoder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _open(tiny_folder, tmp_path)
    expected.encode_ahead(PROMPTS)
    monkeypatch.setattr(DroppedEncoders, "loaded", None)
    again = _open(tiny_folder, tmp_path)
    again.encode_ahead(PROMPTS[1:])
    assert again.encoded == [] and _equal(again.encode(PROMPTS), expected.encode(PROMPTS))


@pytest.mark.slow  # all families, about a second each
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_samples_without_its_text_encoders(family: str, folder_of: FolderOf, tmp_path: Path) -> None:
    _require_equal(family, folder_of(family), tmp_path)


def test_a_family_that_samples_with_one_of_its_encoders_keeps_it(folder_of: FolderOf, tmp_path: Path) -> None:
    _require_equal("ace_step", folder_of("ace_step"), tmp_path)


def _require_equal(family: str, folder: Path, cache: Path) -> None:
    options = FAMILIES[family].options
    plain = pipelines.load(folder, **options)
    cached = pipelines.load(folder, text_cache=str(cache), **options)
    dropped = {*cached.encoders}.difference(cached.sampling_encoders)
    assert all(cached.pipe.components.get(name) is None for name in dropped)
    cached.encode_ahead(PROMPTS)
    assert torch.equal(_prediction(cached, PROMPTS), _prediction(plain, PROMPTS))


def test_the_folder_is_known_by_all_that_changes_the_numbers(tiny_folder: Path, tmp_path: Path) -> None:
    cache, changed = tmp_path / "cache", tmp_path / "sd3"
    own = _folder(_open(tiny_folder, cache))
    shutil.copytree(tiny_folder, changed)
    weights = changed / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert _folder(_open(changed, cache)).name == own.name  # another denoiser, the same texts
    others = [
        _open(tiny_folder, cache, max_sequence_length=4),
        _open(tiny_folder, cache, dtype=torch.bfloat16),
    ]
    encoder = SD3.load(changed).pipe.text_encoder_3
    with torch.no_grad():
        next(encoder.parameters()).flatten()[0] += 1
    encoder.save_pretrained(changed / "text_encoder_3")
    others.append(_open(changed, cache))
    assert len({own, *map(_folder, others)}) == 4


def test_a_damaged_file_is_named_with_what_to_do(tiny_folder: Path, tmp_path: Path) -> None:
    cached = _open(tiny_folder, tmp_path)
    cached.encode_ahead(PROMPTS)
    file = _files(cached)[1]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{file} of the text cache is damaged or incomplete: delete it"):
        _open(tiny_folder, tmp_path).encode_ahead(PROMPTS)
    file.unlink()
    again = _open(tiny_folder, tmp_path)
    again.encode_ahead(PROMPTS)
    assert len(_files(again)) == 3 and again.encode(PROMPTS).tensors["context"].isfinite().all()


@pytest.mark.parametrize("links", [True, False])
def test_the_first_of_two_writers_counts(
    links: bool, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:
        monkeypatch.setattr("os.link", lambda *paths: (_ for _ in ()).throw(PermissionError))
    cache = _open(tiny_folder, tmp_path)._embeddings
    assert isinstance(cache, TextCache)
    for value in (1.0, 2.0):
        cache._write(["a", "b"], {"context": torch.full((2, 3), value)})
    expected = 1.0 if links else 2.0  # without links the last one replaces it, whole
    assert all(torch.equal(cache._read(text)["context"], torch.full((3,), expected)) for text in ("a", "b"))
    assert len([*cache.folder.iterdir()]) == 2  # and nothing temporary is left
    file = next(cache.folder.iterdir())
    with safe_open(file, "pt") as content:
        assert json.loads(content.metadata()["meta"])["text"] in ("a", "b")
    assert file.stat().st_mode & 0o044  # others may read it


def test_ranks_share_the_texts(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cache, "BATCH", 2)
    texts, barrier = [f"text {number}" for number in range(7)], threading.Barrier(2)
    ranks = [_open(tiny_folder, tmp_path) for _ in range(2)]
    seen: dict[int, list[list[str]]] = {0: [], 1: []}
    load, lock = SD3.kind.from_pretrained, threading.Lock()  # transformers cannot load in two threads at once

    def load_alone(*arguments: Any, **named: Any) -> Any:
        with lock:
            return load(*arguments, **named)

    monkeypatch.setattr(SD3.kind, "from_pretrained", load_alone)

    def work(rank: int) -> None:
        encode = ranks[rank].encode_texts
        ranks[rank].encode_texts = lambda batch: seen[rank].append(batch) or encode(batch)  # type: ignore[method-assign]
        ranks[rank].encode_ahead(texts, RankShare(rank, 2), barrier.wait)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    batches = [["", "text 0"], ["text 1", "text 2"], ["text 3", "text 4"], ["text 5", "text 6"]]
    assert seen == {0: batches[::2], 1: batches[1::2]}
    assert _equal(ranks[0].encode(texts), ranks[1].encode(texts))


def test_a_process_that_cannot_wait_encodes_what_others_have_not(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_cache, "BATCH", 2)
    alone = _open(tiny_folder, tmp_path)
    alone.encode_ahead(["a", "b", "c"], RankShare(1, 2))
    assert len(_files(alone)) == 4


def test_what_needs_the_encoders_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    plain = SD3.load(tiny_folder)
    policy = Policy(plain.pipe.text_encoder, Lora(rank=2, targets=("q_proj",)))
    state = {f"text_encoder.{name}": tensor for name, tensor in policy.adapter_state().items()}
    torch_file = tmp_path / "adapter.safetensors"
    text_cache.save_state(torch_file, state, {})
    plain = SD3.load(tiny_folder)
    plain.load_lora(torch_file)
    cached = _open(tiny_folder, tmp_path / "cache")
    with pytest.raises(
        ValueError, match=r"fit no layer .*, or leave model.text_cache out if it has layers on text enc"
    ):
        cached.load_lora(torch_file)
    with pytest.raises(ValueError, match=r"opened without its text encoders: leave model.text_cache out to save it"):
        cached.save_merged(tmp_path / "whole", whole=True)
    cached.save_merged(tmp_path / "network", whole=False)


TRAIN = """
output: {folder}/{name}
model: {{path: {model}, text_cache: {folder}/texts}}
prompts: {folder}/prompts.txt
rewards: {{redness: {{function: tests.genalign.training.toy_runs.redness}}}}
recipe: flow_grpo
sampling: {{num_steps: 3, sigmas: [1.0, 0.6, 0.3], guidance: 2.0}}
training: {{rounds: {rounds}, prompts_per_round: 2, group_size: 2, batch_size: 4, updates_per_round: 1}}
held_out: {{every: 1, samples_per_task: 2, batch_size: 2}}
sample_grid: {{every: 1, count: 2}}
"""


def _train(folder: Path, model: Path, name: str, rounds: int, *words: str) -> list[dict[str, Any]]:
    (folder / "prompts.txt").write_text("\n".join(f"{count} red circles" for count in range(8)))
    config = folder / "train.yaml"
    config.write_text(TRAIN.format(folder=folder, model=model, name=name, rounds=rounds))
    assert main(["train", "--config", str(config), *words]) == 0
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "machine"} for row in rows]


def test_a_run_encodes_once_and_resumes_exactly(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _train(tmp_path, tiny_folder, "whole", 2)
    assert len([*tmp_path.glob("texts/*/*.safetensors")]) == 9
    monkeypatch.setattr(DroppedEncoders, "loaded", None)
    _train(tmp_path, tiny_folder, "halves", 1)
    halves = _train(tmp_path, tiny_folder, "halves", 2, "--resume")
    assert halves == whole
    weights = [tmp_path / name / "lora" / "pytorch_lora_weights.safetensors" for name in ("whole", "halves")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_other_commands_encode_into_the_same_cache(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    shared = ["--model.path", str(tiny_folder), "--model.text_cache", str(tmp_path / "texts"), "--sampling.num_steps"]
    shared += ["2", "--prompts", str(tmp_path / "prompts.txt")]
    shared += ["--rewards.red.function", "tests.genalign.training.toy_runs.redness"]
    evaluate = ["evaluate", "prompts", "--output", str(tmp_path / "scores"), "--seeds", "1", *shared]
    assert main(evaluate) == 0
    assert len([*tmp_path.glob("texts/*/*.safetensors")]) == 3
    monkeypatch.setattr(DroppedEncoders, "loaded", None)
    assert (
        main(["steer", "--output", str(tmp_path / "best"), "--strategy", "BestOfN", "--budget.nfe", "4", *shared]) == 0
    )
    assert (
        main(["prices", "--output", str(tmp_path / "prices.json"), "--batch_size", "2", "--repeats", "1", *shared]) == 0
    )
