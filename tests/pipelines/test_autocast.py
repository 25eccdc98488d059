"""A LoRA under autocast: its multiplications are in bfloat16, and no layer copies its input to float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor, nn

from genalign.diffusion.lora import inject_lora, merge_lora
from genalign.diffusion.policy import Lora, Policy
from genalign.runtime.distributed import own_device
from pipelines import SD3, SDXL
from tests.fake_cuda import FakeCuda
from tests.pipelines.tiny_checkpoints import FolderOf


def _learn(pipeline: SD3, casts: bool) -> tuple[Tensor, Tensor, int]:
    """The prediction, the gradient and the bytes that are saved for it, with or without PEFT's casts of inputs."""
    policy, saved = Policy(pipeline.denoiser, Lora(rank=4)), dict[int, int]()
    for parameter in policy.parameters:
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    step, conditioning = pipeline.grid(4)[1], pipeline.encode(["a circle", "a square"])
    x = pipeline.initial_noise([1, 2])
    with torch.no_grad():
        pipeline.predict(x, step, conditioning, 1.0)  # puts the casts off
    for layer in pipeline.denoiser.modules():
        if isinstance(layer, Linear):
            assert not layer.cast_input_dtype_enabled
            layer.cast_input_dtype_enabled = casts

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = pipeline.predict(x, step, conditioning, 1.0)
    output.square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None])
    return output.detach(), gradient, sum(saved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_of_inputs_change_nothing_but_memory(tiny_folder: Path, dtype: torch.dtype) -> None:
    with_casts, without = (
        _learn(SD3.load(tiny_folder, dtype=dtype, autocast=torch.bfloat16), casts) for casts in (True, False)
    )
    assert torch.equal(with_casts[0], without[0])
    assert torch.equal(with_casts[1], without[1]) and bool(without[1].any())
    assert without[2] <= with_casts[2]
    if dtype == torch.bfloat16:
        assert without[2] < 0.95 * with_casts[2]


def test_no_layer_of_the_adapter_copies_its_input(tiny_folder: Path) -> None:
    pipeline, inputs = SD3.load(tiny_folder, dtype=torch.bfloat16, autocast=torch.bfloat16), list[Tensor]()
    Policy(pipeline.denoiser, Lora(rank=4))
    layers = [layer for layer in pipeline.denoiser.modules() if isinstance(layer, Linear)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        layer.lora_A["default"].register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        pipeline.predict(pipeline.initial_noise([1]), pipeline.grid(4)[1], pipeline.encode(["a circle"]), 1.0)
    assert len(inputs) == 2 * len(layers) > 0
    assert all(a is b and a.dtype == torch.bfloat16 for a, b in zip(inputs[::2], inputs[1::2], strict=True))


def test_adapters_that_are_put_on_later_do_not_cast_either(tiny_folder: Path) -> None:
    pipeline = SD3.load(tiny_folder, dtype=torch.bfloat16, autocast=torch.bfloat16)
    plain = SD3.load(tiny_folder, dtype=torch.bfloat16)

    def casts(opened: SD3) -> set[bool]:
        with torch.no_grad():
            opened.predict(opened.initial_noise([1]), opened.grid(4)[1], opened.encode(["a circle"]), 1.0)
        return {layer.cast_input_dtype_enabled for layer in opened.denoiser.modules() if isinstance(layer, Linear)}

    assert casts(pipeline) == set()
    for target in ("to_q", "to_k"):
        inject_lora(pipeline.denoiser, LoraConfig(r=2, target_modules=[target]))
        assert casts(pipeline) == {False}
        merge_lora(pipeline.denoiser)
    Policy(plain.denoiser, Lora(rank=2))
    assert casts(plain) == {True}  # float32 weights meet bfloat16 inputs


def test_an_autoencoder_that_overflows_in_float16_is_not_under_autocast(folder_of: FolderOf) -> None:
    exact, half = (SDXL.load(folder_of("sdxl"), autocast=autocast) for autocast in (None, torch.float16))
    latents = exact.initial_noise([1])
    assert half.upcasts_vae and torch.equal(half.decode(latents), exact.decode(latents))


def test_float32_is_multiplied_as_tf32_on_cuda_alone() -> None:
    before = torch.get_float32_matmul_precision()
    own_device("cpu", {})
    assert torch.get_float32_matmul_precision() == before == "highest"
    with FakeCuda():
        own_device("cuda", {})
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == before
