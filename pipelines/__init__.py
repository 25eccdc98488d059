"""Diffusers pipelines seen as encode / predict / decode; see ``genalign.types.Pipeline``."""

from pipelines.ace_step import AceStep as AceStep
from pipelines.families import load as load
from pipelines.flux import Flux as Flux
from pipelines.latent_diffusion import SDXL as SDXL
from pipelines.latent_diffusion import StableDiffusion as StableDiffusion
from pipelines.pruning import Pruned as Pruned
from pipelines.pruning import prune as prune
from pipelines.qwen_image import QwenImage as QwenImage
from pipelines.sana import Sana as Sana
from pipelines.sd3 import SD3 as SD3
from pipelines.stable_audio import StableAudio as StableAudio
from pipelines.steering import Steering as Steering
from pipelines.steering import steer as steer
