import re

from rlboard.layout import LAYOUTS, below, exactly, layout_of, margin
from rlboard.registry import TRACKS


def test_a_chart_shows_its_tags_and_no_others() -> None:
    kind, (pattern,) = exactly("Loss/train")
    assert kind == "Multiline"
    assert re.match(pattern, "Loss/train")
    assert not re.match(pattern, "Loss/train_step")
    assert not re.match(pattern, "My/Loss/train")
    _, (dotted,) = exactly("a.b(c)")
    assert re.match(dotted, "a.b(c)")
    assert not re.match(dotted, "axb(c)")


def test_a_chart_of_all_below_a_prefix() -> None:
    _, (pattern,) = below("Accuracy/class_")
    assert re.match(pattern, "Accuracy/class_cat")
    assert not re.match(pattern, "Accuracy/train")


def test_a_margin_has_three_tags() -> None:
    assert margin("m", "l", "u") == ("Margin", ["m", "l", "u"])


LOOPS = {f"{track.package}/{loop.name}": loop for track in TRACKS for loop in track.loops()}


def test_a_loop_has_its_own_dashboard_or_that_of_its_track() -> None:
    assert layout_of(LOOPS["agents/reinforce"]) is LAYOUTS["agents"]
    assert layout_of(LOOPS["vision/gan"]) is LAYOUTS["vision/gan"]
    assert layout_of(LOOPS["vision/explain"]) is None


def test_dashboards_are_of_loops_that_are_there_and_made_of_valid_charts() -> None:
    assert LAYOUTS.keys() <= LOOPS.keys() | {track.package for track in TRACKS}
    for layout in LAYOUTS.values():
        for charts in layout.values():
            for kind, tags in charts.values():
                assert kind in {"Multiline", "Margin"}
                assert kind == "Multiline" or len(tags) == 3
                for tag in tags:
                    re.compile(tag)
