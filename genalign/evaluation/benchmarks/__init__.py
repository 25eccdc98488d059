"""Benchmarks of other authors, by name: their files, rules and numbers, with judges that the user chooses."""

from __future__ import annotations

from collections.abc import Mapping

from genalign.evaluation.benchmarks.benchmark import Benchmark, Judges
from genalign.evaluation.benchmarks.compbench import COMPBENCH
from genalign.evaluation.benchmarks.conceptmix import CONCEPTMIX
from genalign.evaluation.benchmarks.divgenbench import DIVGENBENCH
from genalign.evaluation.benchmarks.dpg import DPG
from genalign.evaluation.benchmarks.geneval2 import GENEVAL2
from genalign.evaluation.benchmarks.ocr import OCR
from genalign.evaluation.benchmarks.unigenbench import UNIGENBENCH

__all__ = ["BENCHMARKS", "Benchmark", "Judges"]

BENCHMARKS: Mapping[str, Benchmark] = {
    benchmark.name: benchmark for benchmark in (COMPBENCH, CONCEPTMIX, DIVGENBENCH, DPG, GENEVAL2, OCR, UNIGENBENCH)
}
