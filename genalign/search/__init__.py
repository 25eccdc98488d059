"""Search at inference time: better samples from a finished model within a counted budget."""

from genalign.scoring.budget import Budget as Budget
from genalign.search.fk_steering import FKSteering as FKSteering
from genalign.search.guidance import DoobGuide as DoobGuide
from genalign.search.guidance import NoiseAwareGradient as NoiseAwareGradient
from genalign.search.guidance import RewardGradient as RewardGradient
from genalign.search.guided_sampling import NRG as NRG
from genalign.search.noise_optimization import DNO as DNO
from genalign.search.noise_optimization import ReNO as ReNO
from genalign.search.noise_search import Evolution as Evolution
from genalign.search.noise_search import ZeroOrder as ZeroOrder
from genalign.search.pruning import Beam as Beam
from genalign.search.pruning import BestOfN as BestOfN
from genalign.search.pruning import Prune as Prune
from genalign.search.results import PlainSample as PlainSample
from genalign.search.results import PromptResult as PromptResult
from genalign.search.results import SearchResult as SearchResult
from genalign.search.run_search import search as search
from genalign.search.stepwise import Selection as Selection
from genalign.search.stepwise import Stepwise as Stepwise
from genalign.search.stepwise import StepwiseCall as StepwiseCall
