"""Diffusers pipelines seen as encode / predict / decode; see ``genalign.types.Pipeline``."""

from pipelines.ace_step import AceStep as AceStep
from pipelines.audio_ldm2 import AudioLDM2 as AudioLDM2
from pipelines.auto import load as load
from pipelines.flux import Flux as Flux
from pipelines.flux2 import Flux2Klein as Flux2Klein
from pipelines.qwen_image import QwenImage as QwenImage
from pipelines.qwen_image21 import QwenImage21 as QwenImage21
from pipelines.sana import Sana as Sana
from pipelines.sd3 import SD3 as SD3
from pipelines.stable_audio import StableAudio as StableAudio
from pipelines.stable_diffusion import SDXL as SDXL
from pipelines.stable_diffusion import StableDiffusion as StableDiffusion
from pipelines.steering.prune import prune as prune
from pipelines.steering.steer import Steering as Steering
from pipelines.steering.steer import steer as steer
from pipelines.z_image import ZImage as ZImage
