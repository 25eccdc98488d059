"""GenEval: its files, its rules on detected objects, prompts in its manner, and evaluations that go on after a kill."""
