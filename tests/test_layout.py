import re

from rlboard.layout import LAYOUTS, below, exactly, margin


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


def test_both_tracks_have_a_dashboard_of_valid_charts() -> None:
    assert set(LAYOUTS) == {"agents", "vision"}
    for layout in LAYOUTS.values():
        for charts in layout.values():
            for kind, tags in charts.values():
                assert kind in {"Multiline", "Margin"}
                assert kind == "Multiline" or len(tags) == 3
                for tag in tags:
                    re.compile(tag)
