"""How to read each TensorBoard tab, and what broken looks like there."""

from collections.abc import Mapping
from typing import NamedTuple


class Note(NamedTuple):
    """How to read a tab."""

    look: str
    broken: str

    @property
    def markdown(self) -> str:
        return f"**What to look for.** {self.look}\n\n**What broken looks like.** {self.broken}"


NOTES: Mapping[str, Note] = {
    "Time Series": Note(
        "Curves, pictures and histograms of all runs on one page, searched by tag and pinned; `reward` rises and "
        "stays.",
        "A curve that is flat from the first point (nothing is learned), that falls off a cliff and does not "
        "return (the learning rate is too large), or that ends early (NaN, or a killed run).",
    ),
    "Scalars": Note(
        "`Loss/train` and `Loss/val` fall together; `Learning_Rate` rises and falls as the schedule says; the "
        "faint line is the truth, the strong one is smoothed.",
        "`Loss/val` turns up while `Loss/train` falls: overfitting. A saw-tooth in steps of an epoch: data that "
        "is not shuffled. Smoothing set so high that a collapse looks like a slope.",
    ),
    "Custom Scalars": Note(
        "The curves that belong together in one chart, laid out by the run itself: loss of training beside loss "
        "of the test, the mean return within the band of best and worst.",
        "An empty chart: its tags are never logged. One line too many: a tag pattern without ^ and $.",
    ),
    "Images": Note(
        "`Input/samples` are upright, in true colours, and match their labels; `Generated/samples` get sharper "
        "from step to step (move the slider) and differ from each other; the heat of `GradCAM` lies on the "
        "object; `eval/video` plays an episode.",
        "Inputs that are grey, inverted or cut: wrong mean, deviation or channel order. Generated tiles that are "
        "all alike: mode collapse. Heat along the borders: the network looks at the padding.",
    ),
    "Audio": Note(
        "`Audio/reward` plays the curve of the reward: the higher the note, the higher the value. A run that "
        "learns climbs.",
        "The same low note over and over: nothing was learned. A fall from high to low: it was learned, and lost.",
    ),
    "Text": Note(
        "`Hyperparameters` has every option with its value, `Model/summary` shapes and parameters of each layer, "
        "`Test/sample_predictions` what is said of single images, and `Tour/…` these notes.",
        "A parameter count that is far from what you meant to build, or sample predictions that are all one class.",
    ),
    "Graphs": Note(
        "The network as it ran: double-click opens a module. `vision/train/tour` is a convolutional network, "
        "`vision/train/tour-vit` a vision transformer, `vision/gan/tour` generator and discriminator in a row.",
        "A module without an arrow to the output is never used; two towers where you meant shared weights.",
    ),
    "Distributions": Note(
        "Weights spread slowly and smoothly; the gradients' bands narrow as training settles.",
        "Gradients that are a single line at 0 (dead or frozen) or whose bands widen without end (exploding).",
    ),
    "Histograms": Note(
        "The same as slices in time, the newest in front: gradients are bells around 0, activations use their range.",
        "One needle at 0 in `Activations/…`: dead ReLUs. All mass at both ends: saturation.",
    ),
    "PR Curves": Note(
        "Precision over recall for each class: good classes hug the upper right corner. Move the step slider to "
        "see it come.",
        "A curve along the share of the class: no better than chance. One class far below the others: look at the"
        " confusion matrix in Images.",
    ),
    "Mesh": Note(
        "`Loss_surface` is the loss around the trained weights, in two random directions; drag to turn it. A wide"
        " bowl with its lowest point in the middle is what one hopes for.",
        "The middle is not the lowest point: training has not arrived. A needle's eye of a valley: sensitive to noise.",
    ),
    "Projector": Note(
        "`Embeddings/test_set` has the test images as points: colour by label, run t-SNE or UMAP, and same "
        "classes form islands. `Word_Embeddings`: click a word, its neighbours are of its kind.",
        "One ball without structure: features that tell nothing apart. Islands that mix colours: classes that are"
        " confused.",
    ),
    "HParams": Note(
        "A row for each run: its options beside what they led to; Parallel Coordinates and Scatter Plot compare many.",
        "Empty metric columns: a run that died before it was judged. One value in every row: you have varied nothing.",
    ),
    "Profile": Note(
        "Where a step's time goes: data, forward, backward, optimizer; operators by their own time; every call on"
        " a time line; the memory over time.",
        "`data` as large as `forward`: the network waits for its images. Memory that climbs from step to step: a leak.",
    ),
}
"""By the name of the tab, in TensorBoard's order."""
