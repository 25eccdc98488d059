"""Align diffusion and flow generators with rewards: train, steer, evaluate.

The public names below are imported when they are first used (PEP 562), so ``import genalign`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genalign.algorithms.few_step_recipes import consistency as consistency
    from genalign.algorithms.few_step_recipes import distribution_matching as distribution_matching
    from genalign.algorithms.few_step_recipes import reward_instruct as reward_instruct
    from genalign.algorithms.few_step_recipes import rg_lcd as rg_lcd
    from genalign.algorithms.pathwise import Ascent as Ascent
    from genalign.algorithms.pathwise_recipes import align_prop as align_prop
    from genalign.algorithms.pathwise_recipes import direct_align as direct_align
    from genalign.algorithms.pathwise_recipes import draft as draft
    from genalign.algorithms.pathwise_recipes import draft_lv as draft_lv
    from genalign.algorithms.pathwise_recipes import drtune as drtune
    from genalign.algorithms.pathwise_recipes import flow_bp as flow_bp
    from genalign.algorithms.pathwise_recipes import instruct_video as instruct_video
    from genalign.algorithms.pathwise_recipes import noise_hypernetwork as noise_hypernetwork
    from genalign.algorithms.pathwise_recipes import refl as refl
    from genalign.algorithms.preference_recipes import crd as crd
    from genalign.algorithms.preference_recipes import dgpo as dgpo
    from genalign.algorithms.preference_recipes import dp2o_sr as dp2o_sr
    from genalign.algorithms.preference_recipes import dpo as dpo
    from genalign.algorithms.preference_recipes import gdro as gdro
    from genalign.algorithms.preference_recipes import kto as kto
    from genalign.algorithms.preference_recipes import rpo as rpo
    from genalign.algorithms.preference_recipes import rwr as rwr
    from genalign.algorithms.preference_recipes import sft as sft
    from genalign.algorithms.recipe import Recipe as Recipe
    from genalign.algorithms.recipe_changes import with_adaptive_group_size as with_adaptive_group_size
    from genalign.algorithms.recipe_changes import with_chi_squared as with_chi_squared
    from genalign.algorithms.recipe_changes import with_credit as with_credit
    from genalign.algorithms.recipe_changes import with_dynamic_sampling as with_dynamic_sampling
    from genalign.algorithms.recipe_changes import with_elastic_reset as with_elastic_reset
    from genalign.algorithms.recipe_changes import with_gradient_balance as with_gradient_balance
    from genalign.algorithms.recipe_changes import with_recalibration as with_recalibration
    from genalign.algorithms.recipes import adv_grpo as adv_grpo
    from genalign.algorithms.recipes import awm as awm
    from genalign.algorithms.recipes import ddpo as ddpo
    from genalign.algorithms.recipes import dense_grpo as dense_grpo
    from genalign.algorithms.recipes import dragon as dragon
    from genalign.algorithms.recipes import dragon_set as dragon_set
    from genalign.algorithms.recipes import flow_dppo as flow_dppo
    from genalign.algorithms.recipes import flow_grpo as flow_grpo
    from genalign.algorithms.recipes import guard_grpo as guard_grpo
    from genalign.algorithms.recipes import mix_grpo as mix_grpo
    from genalign.algorithms.recipes import nft as nft
    from genalign.algorithms.recipes import ngrpo as ngrpo
    from genalign.algorithms.recipes import prdp as prdp
    from genalign.algorithms.recipes import tempflow_grpo as tempflow_grpo
    from genalign.algorithms.recipes import turning_point as turning_point
    from genalign.algorithms.recipes import vgpo as vgpo
    from genalign.diffusion.hypernetwork import Hypernetwork as Hypernetwork
    from genalign.diffusion.policy import Lora as Lora
    from genalign.diffusion.policy import Policy as Policy
    from genalign.diffusion.sampling import Sampling as Sampling
    from genalign.diffusion.transitions import CPS as CPS
    from genalign.diffusion.transitions import DDIM as DDIM
    from genalign.diffusion.transitions import DPMSDE as DPMSDE
    from genalign.diffusion.transitions import ODE as ODE
    from genalign.diffusion.transitions import CalibratedSDE as CalibratedSDE
    from genalign.diffusion.transitions import DanceSDE as DanceSDE
    from genalign.diffusion.transitions import FlowSDE as FlowSDE
    from genalign.evaluation.paired import gain as gain
    from genalign.evaluation.python_api import evaluate as evaluate
    from genalign.scoring.budget import Budget as Budget
    from genalign.scoring.score import NamedReward as NamedReward
    from genalign.search import DNO as DNO
    from genalign.search import NRG as NRG
    from genalign.search import Beam as Beam
    from genalign.search import BestOfN as BestOfN
    from genalign.search import DoobGuide as DoobGuide
    from genalign.search import Evolution as Evolution
    from genalign.search import FKSteering as FKSteering
    from genalign.search import NoiseAwareGradient as NoiseAwareGradient
    from genalign.search import Prune as Prune
    from genalign.search import ReNO as ReNO
    from genalign.search import RewardGradient as RewardGradient
    from genalign.search import ZeroOrder as ZeroOrder
    from genalign.training.noise_calibration import calibrated as calibrated
    from genalign.training.offline import stored_score as stored_score
    from genalign.training.python_api import train as train
    from genalign.training.round_result import RoundResult as RoundResult
    from genalign.training.settings import TrainerSettings as TrainerSettings
    from genalign.training.trainer import Trainer as Trainer
    from genalign.types import Prompt as Prompt
    from genalign.types import PromptSet as PromptSet

_PUBLIC = {
    "genalign.algorithms.few_step_recipes": "consistency distribution_matching reward_instruct rg_lcd",
    "genalign.algorithms.pathwise": "Ascent",
    "genalign.algorithms.pathwise_recipes": "align_prop direct_align draft draft_lv drtune flow_bp instruct_video"
    " noise_hypernetwork refl",
    "genalign.algorithms.preference_recipes": "crd dgpo dp2o_sr dpo gdro kto rpo rwr sft",
    "genalign.algorithms.recipe": "Recipe",
    "genalign.algorithms.recipe_changes": "with_adaptive_group_size with_chi_squared with_credit with_dynamic_sampling"
    " with_elastic_reset with_gradient_balance with_recalibration",
    "genalign.algorithms.recipes": "adv_grpo awm ddpo dense_grpo dragon dragon_set flow_dppo flow_grpo guard_grpo"
    " mix_grpo nft ngrpo prdp tempflow_grpo turning_point vgpo",
    "genalign.diffusion.hypernetwork": "Hypernetwork",
    "genalign.diffusion.policy": "Lora Policy",
    "genalign.diffusion.sampling": "Sampling",
    "genalign.diffusion.transitions": "CPS DDIM DPMSDE ODE CalibratedSDE DanceSDE FlowSDE",
    "genalign.evaluation.paired": "gain",
    "genalign.evaluation.python_api": "evaluate",
    "genalign.scoring.budget": "Budget",
    "genalign.scoring.score": "NamedReward",
    "genalign.search": "DNO NRG Beam BestOfN DoobGuide Evolution FKSteering NoiseAwareGradient Prune ReNO"
    " RewardGradient ZeroOrder",
    "genalign.training.noise_calibration": "calibrated",
    "genalign.training.offline": "stored_score",
    "genalign.training.python_api": "train",
    "genalign.training.round_result": "RoundResult",
    "genalign.training.settings": "TrainerSettings",
    "genalign.training.trainer": "Trainer",
    "genalign.types": "Prompt PromptSet",
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("genalign")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'genalign' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
