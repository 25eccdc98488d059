"""Tones and noise bursts, 1.5 s at 8 kHz: clips, prompts with GenEval-like metadata, splits, and an exact verifier."""

from genalign.worlds.grammar import SUITES as SUITES
from genalign.worlds.tones.instruments import SAMPLE_RATE as SAMPLE_RATE
from genalign.worlds.tones.prompts import prompts as prompts
from genalign.worlds.tones.scenes import Clip as Clip
from genalign.worlds.tones.scenes import Event as Event
from genalign.worlds.tones.scenes import render as render
from genalign.worlds.tones.scenes import render_metadata as render_metadata
from genalign.worlds.tones.scenes import sample_clip as sample_clip
from genalign.worlds.tones.verifier import VERIFIER_VERSION as VERIFIER_VERSION
