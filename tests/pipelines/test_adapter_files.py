"""Adapters in every spelling that users have: applied whole or refused in one line, saved as they were sampled with."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pipelines
from genalign.diffusion.lora import ADAPTER, inject_lora, save_peft
from genalign.diffusion.policy import Policy
from pipelines.adapter_files import read_adapter
from pipelines.base import DiffusersPipeline
from tests.pipelines.tiny_checkpoints import FAMILIES

# the Euler scheduler makes an array of a tensor without NumPy 2's keyword
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
State = dict[str, Tensor]
ADAPTED = ("sd15", "sdxl", "sd3", "flux")
PROMPTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    yield {family: FAMILIES[family].save(folder / family) for family in ADAPTED}
    _opened.cache_clear()


@functools.cache
def _opened(folder: Path) -> DiffusersPipeline:
    return pipelines.load(folder, height=64, width=64)


def _open(folder: Path) -> DiffusersPipeline:
    return copy.deepcopy(_opened(folder))  # a third of the time of opening it again


def _layers(network: nn.Module, ends: tuple[str, ...]) -> dict[str, nn.Linear]:
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.endswith(ends)}


def _random_state(network: nn.Module, ends: tuple[str, ...] = ("to_q", "to_k", "to_out.0"), rank: int = 3) -> State:
    """Weights under PEFT's names for the layers that end so."""
    torch.manual_seed(1)
    state = {}
    for name, layer in _layers(network, ends).items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, layer.in_features)
        state[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, rank) / 10
    return state


def _output(pipeline: DiffusersPipeline) -> Tensor:
    x, step = pipeline.initial_noise([1, 2]), pipeline.grid(3)[1]
    with torch.no_grad():
        return pipeline.predict(x, step, pipeline.encode(PROMPTS), 1.0)


def _expected(folder: Path, state: State, alpha: float = 3, encoder: State | None = None) -> Tensor:
    """The output with this adapter, put on by PEFT itself."""
    pipeline = _open(folder)
    parts = [(pipeline.denoiser, state), *([(pipeline.pipe.text_encoder, encoder)] if encoder else [])]
    for network, tensors in parts:
        targets = sorted({name.split(".lora_")[0] for name in tensors})
        inject_lora(network, LoraConfig(r=3, lora_alpha=alpha, target_modules=targets), tensors)  # type: ignore[arg-type]  # fractions work
    return _output(pipeline)


def _renamed(state: State, name: Callable[[str], str]) -> State:
    return {name(key): tensor.clone() for key, tensor in state.items()}


def _kohya(key: str, prefix: str) -> str:
    layer, kind = key.split(".lora_")
    return f"{prefix}_{layer.replace('.', '_')}.{'lora_down' if kind.startswith('A') else 'lora_up'}.weight"


def _processor(key: str) -> str:
    layer, kind = key.split(".lora_")
    attention, _, target = layer.replace("to_out.0", "to_out").rpartition(".")
    return f"unet.{attention}.processor.{target}_lora.{'down' if kind.startswith('A') else 'up'}.weight"


def _old(key: str) -> str:
    return key.replace("lora_A", "lora.down").replace("lora_B", "lora.up")


SPELLINGS: Mapping[str, Callable[[str, str], str]] = {
    "diffusers": lambda key, component: f"{component}.{key}",
    "bare": lambda key, component: key,
    "peft": lambda key, component: f"base_model.model.{key}",
    "peft named": lambda key, component: "base_model.model." + key.replace(".weight", ".default.weight"),
    "comfyui": lambda key, component: f"diffusion_model.{key}",
    "comfyui down": lambda key, component: (
        "diffusion_model." + key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
    ),
    "kohya": lambda key, component: _kohya(key, "lora_unet"),
    "kohya transformer": lambda key, component: _kohya(key, "lora_transformer"),
    "old diffusers": lambda key, component: f"{component}.{_old(key)}",
    "linear layer": lambda key, component: f"{component}.{_old(key).replace('.lora.', '.lora_linear_layer.')}",
    "compiled": lambda key, component: f"{component}._orig_mod.{key}",
    "checkpointed": lambda key, component: f"{component}._checkpoint_wrapped_module.{key}",
    "ddp": lambda key, component: f"module.{component}.{key}",
    "fsdp": lambda key, component: f"{component}._fsdp_wrapped_module.{key.replace('.', '._fsdp_wrapped_module.', 1)}",
}


@pytest.mark.parametrize(
    ("family", "spelling"),
    [("sd15", name) for name in SPELLINGS] + [(f, name) for f in ADAPTED[1:] for name in ("peft", "comfyui", "kohya")],
)
def test_every_spelling_is_applied_whole(family: str, spelling: str, checkpoints: Any, tmp_path: Path) -> None:
    pipeline = _open(checkpoints[family])
    state = _random_state(pipeline.denoiser)
    file = tmp_path / "mine.safetensors"
    save_file(_renamed(state, lambda key: SPELLINGS[spelling](key, pipeline.denoiser_name)), file)
    pipeline.load_lora(file)
    torch.testing.assert_close(_output(pipeline), _expected(checkpoints[family], state), rtol=0, atol=1e-6)


def test_attention_processors_of_old_diffusers_are_applied(checkpoints: Any, tmp_path: Path) -> None:
    pipeline = _open(checkpoints["sd15"])
    state = _random_state(pipeline.denoiser)
    save_file(_renamed(state, _processor), tmp_path / "pytorch_lora_weights.safetensors")
    pipeline.load_lora(tmp_path)
    torch.testing.assert_close(_output(pipeline), _expected(checkpoints["sd15"], state), rtol=0, atol=1e-6)


def test_names_of_another_implementation_are_converted(checkpoints: Any, tmp_path: Path) -> None:
    """FLUX's own names, as kohya writes them."""
    pipeline = _open(checkpoints["flux"])
    state = {key: tensor for key, tensor in _random_state(pipeline.denoiser).items() if "s.0.attn.to_out.0." in key}
    own = _renamed(
        state, lambda key: _kohya("double_blocks.0.img_attn.proj.lora_" + key.split(".lora_")[1], "lora_unet")
    )
    assert len(own) == 2
    save_file(own | {"lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(3.0)}, tmp_path / "a.safetensors")
    pipeline.load_lora(tmp_path)
    torch.testing.assert_close(_output(pipeline), _expected(checkpoints["flux"], state), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "prefix", "component", "end"),
    [
        ("sdxl", "lora_te2", "text_encoder_2", "q_proj"),
        ("sd3", "lora_te3", "text_encoder_3", ".q"),
        ("flux", "lora_te2", "text_encoder_2", ".q"),
    ],
)
def test_kohya_names_of_the_other_text_encoders_are_applied(
    family: str, prefix: str, component: str, end: str, checkpoints: Any, tmp_path: Path
) -> None:
    pipeline = _open(checkpoints[family])
    encoder = pipeline.pipe.components[component]
    state = _random_state(encoder, (end,))
    save_file(_renamed(state, lambda key: _kohya(key, prefix)), tmp_path / "a.safetensors")
    pipeline.load_lora(tmp_path)
    applied = get_peft_model_state_dict(encoder, adapter_name=ADAPTER)
    assert applied.keys() == state.keys() and len(state) > 0
    assert all(torch.equal(applied[key], tensor) for key, tensor in state.items())


def test_layers_of_a_text_encoder_are_not_dropped_in_the_format_of_peft(checkpoints: Any, tmp_path: Path) -> None:
    pipeline = _open(checkpoints["sd3"])
    state = _random_state(pipeline.pipe.text_encoder, ("q_proj",))
    save_file(_renamed(state, lambda key: f"text_encoder.{key}"), tmp_path / "a.safetensors")
    pipeline.load_lora(tmp_path)
    config = LoraConfig(r=3, target_modules=["to_q"], bias="lora_only")
    with pytest.raises(ValueError, match="layers of the text encoders cannot be saved in this format"):
        pipeline.save_lora(tmp_path / "saved", _random_state(pipeline.denoiser, ("to_q",)), config)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("prefix", ["text_encoder.text_model", "text_encoder", "lora_te_text_model", "lora_te1"])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_layers_of_a_text_encoder_are_applied_and_saved(
    family: str, prefix: str, checkpoints: Any, tmp_path: Path
) -> None:
    pipeline = _open(checkpoints[family])
    encoder = {
        k.removeprefix("text_model."): v for k, v in _random_state(pipeline.pipe.text_encoder, ("q_proj",)).items()
    }
    state = _random_state(pipeline.denoiser)
    spelled = (lambda key: _kohya(key, prefix)) if prefix.startswith("lora") else (lambda key: f"{prefix}.{key}")
    save_file(
        _renamed(state, lambda k: f"{pipeline.denoiser_name}.{k}") | _renamed(encoder, spelled),
        tmp_path / "a.safetensors",
    )
    pipeline.load_lora(tmp_path)
    names = {name.removeprefix("text_model."): name for name, _ in pipeline.pipe.text_encoder.named_modules()}
    own = {f"{names_of(key, names)}": tensor for key, tensor in encoder.items()}
    expected = _expected(checkpoints[family], state, encoder=own)
    torch.testing.assert_close(_output(pipeline), expected, rtol=0, atol=1e-6)

    policy = Policy(pipeline.denoiser, None, has_adapter=True)
    assert policy.config is not None
    pipeline.save_lora(tmp_path / "saved", policy.adapter_state(), policy.config)
    again = _open(checkpoints[family])
    again.load_lora(tmp_path / "saved")
    torch.testing.assert_close(_output(again), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="layers on the text encoders: export the whole pipeline"):
        again.save_merged(tmp_path / "merged", whole=False)
    again.save_merged(tmp_path / "merged", whole=True)
    torch.testing.assert_close(_output(_open(tmp_path / "merged")), expected, rtol=0, atol=1e-5)


def names_of(key: str, names: Mapping[str, str]) -> str:
    layer, kind = key.split(".lora_")
    return f"{names.get(layer, layer).replace('.base_layer', '')}.lora_{kind}"


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    alphas=st.lists(st.one_of(st.none(), st.floats(0.5, 8)), min_size=1, max_size=3),
    spelling=st.sampled_from(["kohya", "diffusers", "comfyui down", "compiled"]),
)
def test_any_part_of_the_layers_with_any_ranks_and_alphas_is_applied_whole(
    seed: int, ranks: list[int], alphas: list[float | None], spelling: str, checkpoints: Any, tmp_path_factory: Any
) -> None:
    """The adapter, merged by hand: W + alpha / rank B A, with alpha = rank where the file has none."""
    draw, folder = random.Random(seed), tmp_path_factory.mktemp("adapter")
    pipeline, merged = _open(checkpoints["sd15"]), _open(checkpoints["sd15"])
    every = _layers(pipeline.denoiser, ("to_q", "to_k", "to_v", "to_out.0", "proj"))
    state: State = {}
    for number, name in enumerate(draw.sample(sorted(every), draw.randint(1, len(every)))):
        rank, alpha = ranks[number % len(ranks)], alphas[number % len(alphas)]
        a, b = torch.randn(rank, every[name].in_features), torch.randn(every[name].out_features, rank) / 10
        keys = [SPELLINGS[spelling](f"{name}.lora_{kind}.weight", "unet") for kind in "AB"]
        state |= dict(zip(keys, (a, b), strict=True))
        if alpha is not None:
            state[keys[0].rsplit(".", 2)[0] + ".alpha"] = torch.tensor(alpha)
        layer = merged.denoiser.get_submodule(name)
        layer.weight.data += (rank if alpha is None else alpha) / rank * b @ a  # type: ignore[operator, union-attr]  # a Linear
    save_file(state, folder / "a.safetensors")
    pipeline.load_lora(folder)
    torch.testing.assert_close(_output(pipeline), _output(merged), rtol=1e-4, atol=1e-4)


# PEFT's check takes the bias of lora_B for a matrix
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.*invalid shape")
@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"alpha_pattern": {"to_q": 9}},
        {"rank_pattern": {"to_q": 5}, "use_rslora": True},
    ],
)
def test_uncommon_settings_of_peft_are_opened_as_they_were_saved(
    options: dict[str, Any], checkpoints: Any, tmp_path: Path
) -> None:
    first = _open(checkpoints["sd3"])
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_out.0"], init_lora_weights=False, **options)
    inject_lora(first.denoiser, config)
    policy = Policy(first.denoiser, None, has_adapter=True)
    if options.get("bias"):
        for name, parameter in first.denoiser.named_parameters():
            if name.endswith("to_q.base_layer.bias"):
                parameter.data += 0.1
    save_peft(tmp_path / "peft", policy.adapter_state(), config)
    first.save_lora(tmp_path / "lora", policy.adapter_state(), config)
    for folder in ("peft", "lora"):
        other = _open(checkpoints["sd3"])
        other.load_lora(tmp_path / folder)
        torch.testing.assert_close(_output(other), _output(first), rtol=0, atol=1e-6)


def test_trained_biases_are_saved_for_peft(checkpoints: Any, tmp_path: Path) -> None:
    """diffusers' loader refuses a file that holds them, and PEFT's own opens what is written."""
    pipeline, other = _open(checkpoints["sd3"]), _open(checkpoints["sd3"])
    config = LoraConfig(r=3, target_modules=["to_q"], init_lora_weights=False, bias="lora_only")
    inject_lora(pipeline.denoiser, config)
    pipeline.save_lora(tmp_path, Policy(pipeline.denoiser, None, has_adapter=True).adapter_state(), config)
    opened = PeftModel.from_pretrained(other.denoiser, str(tmp_path)).get_base_model()
    assert opened is other.denoiser
    torch.testing.assert_close(_output(other), _output(pipeline), rtol=0, atol=1e-6)


def _write(folder: Path, state: State, name: str = "a.safetensors") -> None:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / name)


A, B = torch.ones(2, 4), torch.ones(4, 2)
REFUSED: Mapping[str, tuple[Callable[[Path, State], object], str]] = {
    "deeper network": (
        lambda f, s: _write(f, s | {"transformer.transformer_blocks.77.attn.to_q.lora_A.weight": A}),
        r"1 of its \d+ entries fit no layer of this model, such as 'transformer\.transformer_blocks\.77",
    ),
    "other network": (lambda f, s: _write(f, {"unet.mid.to_q.lora_A.weight": A}), "fit no layer of this model"),
    "no adapter": (lambda f, s: _write(f, {"transformer.proj_out.weight": A}), "fit no layer of this model"),
    "alphas alone": (
        lambda f, s: _write(f, {"transformer.transformer_blocks.0.attn.to_q.alpha": torch.tensor(1.0)}),
        "holds no adapter: its entries are no LoRA weights",
    ),
    "no entries": (lambda f, s: _write(f, {}), "holds no adapter"),
    "other part": (lambda f, s: _write(f, s | {"text_encoder.foo.lora_A.weight": A}), "1 of its"),
    "one matrix": (lambda f, s: _write(f, dict(list(s.items())[1:])), "has no other matrix of the same rank"),
    "other width": (
        lambda f, s: _write(f, {k: t[:, :1].clone() if "_A" in k else t for k, t in s.items()}),
        "does not fit this network",
    ),
    "half a file": (
        lambda f, s: (_write(f, s), (f / "a.safetensors").write_bytes((f / "a.safetensors").read_bytes()[:900])),
        "is damaged or incomplete",
    ),
    "lfs": (
        lambda f, s: (f / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x"),
        "git lfs pull",
    ),
    "two files": (
        lambda f, s: (_write(f, s, "step100.safetensors"), _write(f, s, "step200.safetensors")),
        "give one of them",
    ),
    "pickle": (lambda f, s: (f / "adapter_model.bin").write_bytes(b""), "is pickled, which is not opened"),
    "empty": (lambda f, s: None, r"has no \.safetensors file of an adapter: give a run with lora/"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_applied_whole_is_refused_in_one_line(case: str, checkpoints: Any, tmp_path: Path) -> None:
    pipeline = _open(checkpoints["sd3"])
    state = _renamed(_random_state(pipeline.denoiser), lambda key: f"transformer.{key}")
    write, message = REFUSED[case]
    write(tmp_path, state)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        pipeline.load_lora(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_run_folder_stands_for_its_lora(checkpoints: Any, tmp_path: Path) -> None:
    pipeline = _open(checkpoints["sd3"])
    state = _random_state(pipeline.denoiser)
    (tmp_path / "lora").mkdir()
    save_file(_renamed(state, lambda key: f"transformer.{key}"), tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    pipeline.load_lora(tmp_path)
    torch.testing.assert_close(_output(pipeline), _expected(checkpoints["sd3"], state), rtol=0, atol=1e-6)
    with pytest.raises(FileNotFoundError, match="runs/nothere"):
        _open(checkpoints["sd3"]).load_lora("runs/nothere")
    with pytest.raises(FileNotFoundError, match=r"there is no adapter .*nothere: give a run's folder"):
        _open(checkpoints["sd3"]).load_lora(tmp_path / "nothere")


def test_a_file_of_diffusers_keeps_its_configuration(checkpoints: Any, tmp_path: Path) -> None:
    pipeline = _open(checkpoints["sd3"])
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["to_q"], init_lora_weights=False)
    inject_lora(pipeline.denoiser, config)
    policy = Policy(pipeline.denoiser, None, has_adapter=True)
    pipeline.save_lora(tmp_path, policy.adapter_state(), config)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    networks = {"transformer": _open(checkpoints["sd3"]).denoiser}
    assert read_adapter(file, networks, "transformer")["transformer"].peft_config().lora_alpha == 7
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps({})})
    assert read_adapter(file, networks, "transformer")["transformer"].peft_config().lora_alpha == 3
