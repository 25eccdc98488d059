"""Diffusers pipelines seen as encode / predict / decode; see ``genalign.types.Pipeline``."""

from pipelines.pruning import Pruned as Pruned
from pipelines.pruning import prune as prune
from pipelines.sd3 import SD3 as SD3
from pipelines.steering import Steering as Steering
from pipelines.steering import steer as steer
