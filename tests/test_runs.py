"""What a run keeps of the machine it ran on."""

import platform

from lvsoftmax.runs import processor_name

TWO = """processor\t: 0
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
flags\t\t: fpu vme

processor\t: 1
cpu family\t: 26
model name\t: Another
"""


def test_processors_of_one_name_are_told_apart_by_family_and_model():
    assert processor_name(TWO) == "AMD EPYC, family 25, model 17"
    assert processor_name(TWO.replace(": 25", ": 26").replace(": 17", ": 2")) == "AMD EPYC, family 26, model 2"
    assert processor_name("model name\t: Neoverse: N1\n") == "Neoverse: N1"
    assert processor_name("Features\t: fp asimd\n") == platform.processor()
