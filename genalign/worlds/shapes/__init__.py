"""Colored shapes on gray, 64 x 64: scenes, prompts with GenEval metadata, splits, and an exact verifier."""

from genalign.worlds.shapes.prompts import SUITES as SUITES
from genalign.worlds.shapes.prompts import prompts as prompts
from genalign.worlds.shapes.scenes import Scene as Scene
from genalign.worlds.shapes.scenes import Shape as Shape
from genalign.worlds.shapes.scenes import render as render
from genalign.worlds.shapes.scenes import render_metadata as render_metadata
from genalign.worlds.shapes.scenes import sample_scene as sample_scene
from genalign.worlds.shapes.verifier import VERIFIER_VERSION as VERIFIER_VERSION
