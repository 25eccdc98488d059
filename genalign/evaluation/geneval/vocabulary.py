"""GenEval's vocabulary (Ghosh et al., arXiv:2310.11513): COCO's 80 classes, colors, relations and tasks."""

from __future__ import annotations

_OBJECTS = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator,
book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
OBJECTS = tuple(" ".join(name.split()) for name in _OBJECTS.split(","))
"""The classes in COCO's order, the order of a detector's 80 outputs; GenEval renames COCO's mouse, remote and
keyboard."""

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

_IRREGULAR = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "skis": "pairs of skis",
    "scissors": "pairs of scissors",
    "computer mouse": "computer mice",
}


def natural_plural(name: str) -> str:
    """Return the plural in correct English; GenEval's own prompts say "sheeps" (``grammar.plural``)."""
    if name in _IRREGULAR:
        return _IRREGULAR[name]
    return name + ("es" if name.endswith(("s", "sh", "ch", "x")) else "s")
