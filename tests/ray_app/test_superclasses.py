"""The superclasses of CIFAR-100 ship complete and in the order of their numbers."""

from collections import Counter

from ray_app.superclasses import load_superclasses


def test_the_twenty_superclasses_have_five_classes_each_and_their_official_numbers() -> None:
    table = load_superclasses("superclasses", "cifar20")
    names = list(dict.fromkeys(table.values()))
    assert Counter(table.values()) == dict.fromkeys(names, 5)
    # fine label -> coarse label, as in the files of the data set.
    official = {
        "apple": 4, "aquarium_fish": 1, "baby": 14, "bear": 8, "bee": 7, "bed": 6, "beaver": 0,
        "bottle": 3, "bridge": 9, "bus": 18, "camel": 11, "clock": 5, "cloud": 10, "crab": 13,
        "fox": 12, "hamster": 16, "lawn_mower": 19, "maple_tree": 17, "orchid": 2, "snake": 15,
    }  # fmt: skip
    assert {label: names.index(table[label]) for label in official} == official
