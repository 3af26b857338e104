"""Word vectors: the pairs they are learned from, the network, its loss, and what they know in the end."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from rlboard.events import Embedding
from vision._features import principal_components
from vision._pictures import scatter
from vision._text import CAPITALS, CATEGORIES, analogies


class Corpus(NamedTuple):
    """A text as numbers.

    words: each once, the most frequent first. counts: of each, (W,). pairs: the words of all places and those in the
    windows around them, (N, 2).
    """

    words: tuple[str, ...]
    counts: Tensor
    pairs: Tensor


def read_corpus(sentences: Sequence[Sequence[str]], window: int, keep: float, generator: torch.Generator) -> Corpus:
    """The corpus of `sentences`.

    Args:
        sentences: their words; no window reaches from one into another.
        window: how many words before and behind a word are its context.
        keep: t: of a word with the share f of the text, a share of sqrt(t / f) of its places is kept, all where f < t.
            Frequent words say little, and without them windows reach further.
        generator: decides which.
    """
    counted = Counter(word for sentence in sentences for word in sentence)
    words = tuple(word for word, _ in counted.most_common())
    number = {word: index for index, word in enumerate(words)}
    text = torch.tensor([number[word] for sentence in sentences for word in sentence])
    places = torch.repeat_interleave(
        torch.arange(len(sentences)), torch.tensor([len(sentence) for sentence in sentences])
    )
    counts = text.bincount(minlength=len(words))
    kept = torch.rand(len(text), generator=generator) < (keep * len(text) / counts).sqrt()[text]
    text, places = text[kept], places[kept]
    pairs = []
    for distance in range(1, window + 1):
        same = places[distance:] == places[:-distance]
        before, behind = text[:-distance][same], text[distance:][same]
        pairs += [torch.stack((before, behind), dim=1), torch.stack((behind, before), dim=1)]
    return Corpus(words, counts, torch.cat(pairs))


class SkipGram(nn.Module):
    """Two vectors for each of `words` words: one as the word itself, in `vectors`, one as the context of others."""

    def __init__(self, words: int, dimensions: int) -> None:
        super().__init__()
        self.vectors, self.contexts = nn.Embedding(words, dimensions), nn.Embedding(words, dimensions)
        nn.init.uniform_(self.vectors.weight, -0.5 / dimensions, 0.5 / dimensions)
        nn.init.zeros_(self.contexts.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """The scores (B, 1 + K) of a true context and K others, of (B, 2 + K): a word, its context, the others."""
        scores: Tensor = (self.contexts(inputs[:, 1:]) @ self.vectors(inputs[:, 0])[:, :, None])[:, :, 0]
        return scores


def negative_sampling_loss(scores: Tensor) -> Tensor:
    """-log sigmoid(score of the true context) - sum of log sigmoid(-score of each other), the mean over (B, 1 + K)."""
    return -(functional.logsigmoid(scores[:, 0]) + functional.logsigmoid(-scores[:, 1:]).sum(dim=1)).mean()


def similarities(vectors: Tensor) -> Tensor:
    """The cosine between all pairs of `vectors` (W, D), -inf of each with itself, (W, W)."""
    directions = functional.normalize(vectors, dim=1)
    return (directions @ directions.T).fill_diagonal_(-torch.inf)


def completed(vectors: Tensor, questions: Tensor) -> Tensor:
    """The words d that are to c as b is to a, (Q,), for `questions` (Q, 3): the nearest to b - a + c, but none of them.

    The vectors (W, D) are of length 1 before they are added up.
    """
    directions = functional.normalize(vectors, dim=1)
    a, b, c = (directions[column] for column in questions.T)
    cosines = functional.normalize(b - a + c, dim=1) @ directions.T
    return cosines.scatter_(1, questions, -torch.inf).argmax(dim=1)


class Vocabulary:
    """What is known of the words of a corpus, and how far their vectors, (W, D), know it too."""

    def __init__(self, corpus: Corpus) -> None:
        self.words, self.counts = corpus.words, corpus.counts.tolist()
        self.categories = tuple(CATEGORIES)
        category = {word: label for label, words in enumerate(CATEGORIES.values()) for word in words}
        self.labels = torch.tensor([category.get(word, -1) for word in corpus.words])
        self.judged = (self.labels >= 0).nonzero().flatten()
        number = {word: index for index, word in enumerate(corpus.words)}
        known = [question for question in analogies() if all(word in number for word in question)]
        self.questions = torch.tensor([[number[word] for word in question] for question in known])

    def scores(self, vectors: Tensor) -> tuple[float, float]:
        """In percent: the words of a category whose nearest neighbour is of the same, and the analogies that are right.

        The neighbour is the nearest of all words, and one of no category is wrong.
        """
        found = vectors.detach().cpu()
        nearest = similarities(found)[self.judged].argmax(dim=1)
        alike = self.labels[nearest] == self.labels[self.judged]
        right = completed(found, self.questions[:, :3]) == self.questions[:, 3]
        return 100 * alike.float().mean().item(), 100 * right.float().mean().item()

    def neighbour_table(self, vectors: Tensor, rows: int = 3, neighbours: int = 5) -> str:
        """The nearest neighbours of some words of each category, and their cosines, as a Markdown table."""
        cosines, nearest = similarities(vectors.detach().cpu()).topk(neighbours, dim=1)
        lines = ["| word | category | nearest neighbours, with their cosine |", "|---|---|---|"]
        for label, category in enumerate(self.categories):
            for index in (self.labels == label).nonzero().flatten()[:rows].tolist():
                pairs = zip(nearest[index].tolist(), cosines[index].tolist(), strict=True)
                listed = ", ".join(f"{self.words[other]} {cosine:.2f}" for other, cosine in pairs)
                lines.append(f"| {self.words[index]} | {category} | {listed} |")
        return "\n".join(lines)

    def analogy_table(self, vectors: Tensor, rows: int = 16) -> str:
        """Some of the analogies, and what the vectors make of them, as a Markdown table."""
        answers = completed(vectors.detach().cpu(), self.questions[:, :3])
        lines = ["| analogy | answer | right |", "|---|---|---|"]
        for index in torch.linspace(0, len(answers) - 1, min(rows, len(answers))).long().tolist():
            a, b, c, d = (self.words[word] for word in self.questions[index].tolist())
            answer = self.words[int(answers[index])]
            lines.append(f"| {b} - {a} + {c} | {answer} | {'yes' if answer == d else f'no, {d}'} |")
        return "\n".join(lines)

    def picture(self, vectors: Tensor) -> NDArray[np.uint8]:
        """The words of all categories in the plane of their principal components."""
        return self._drawn(vectors, self.judged, "Words by their vectors, principal components")

    def capitals_picture(self, vectors: Tensor) -> NDArray[np.uint8]:
        """Countries and their capitals in the plane of their principal components, as in figure 2 of the paper."""
        number = {word: index for index, word in enumerate(self.words)}
        pairs = [(number[country], number[capital]) for country, capital in CAPITALS.items()
                 if country in number and capital in number]  # fmt: skip
        lines = [(2 * index, 2 * index + 1) for index in range(len(pairs))]
        chosen = torch.tensor(pairs).flatten()
        return self._drawn(vectors, chosen, "Countries and their capitals, principal components", lines)

    def _drawn(
        self, vectors: Tensor, chosen: Tensor, title: str, lines: Sequence[tuple[int, int]] = ()
    ) -> NDArray[np.uint8]:
        layout = principal_components(vectors.detach().cpu()[chosen])
        present, labels = torch.unique(self.labels[chosen], return_inverse=True)
        classes = [self.categories[label] for label in present.tolist()]
        return scatter(layout, labels, classes, title, [self.words[index] for index in chosen.tolist()], lines)

    def points(self, vectors: Tensor) -> Embedding:
        """All words for the Projector."""
        names = [self.categories[label] if label >= 0 else "others" for label in self.labels.tolist()]
        rows = list(zip(self.words, names, self.counts, strict=True))
        return Embedding(vectors.detach(), rows, ("word", "category", "count"))
