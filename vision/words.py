"""Learn vectors of words from a small text, and look at them in the Projector.

Skip-gram with negative sampling: the vector v of a word shall tell which words stand near it in the text, by a second
vector u that each word has as the context of others. For a word w, a word c from its window, and K words drawn by
chance, the more often the more frequent they are, P(k) ~ count(k)^(3/4),

    loss = -log sigmoid(u_c . v_w) - sum over k of log sigmoid(-u_k . v_w)

Nobody says which words are animals and which are fruits, but what is used alike comes to lie together, and what differs
alike lies apart in the same direction: king - man + woman is queen. A small grammar makes the text, so that this can be
counted: `Accuracy/neighbours` is the share of words, in percent, whose nearest neighbour of all by cosine is of the
same category, `Accuracy/analogies` that of the analogies that are right.

It stands with the images because an embedding is the same whatever it is of, and this is the smallest there is.

The defaults take 15 s of CPU, the start of Python and torch included, on one core without a GPU, and end with 100 %
of the neighbours and of the analogies (seeds 1 to 3).

Source: T. Mikolov et al., "Distributed Representations of Words and Phrases and their Compositionality", 2013,
arXiv:1310.4546.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from rlboard.config import option
from rlboard.devices import resolve_device
from rlboard.events import Event
from rlboard.seeding import seed_everything
from vision._optimizers import finite
from vision._text import sentences
from vision._words import SkipGram, Vocabulary, negative_sampling_loss, read_corpus


@dataclass(frozen=True)
class Config:
    sentences: int = option(10_000, "sentences of the text", min=1000, max=10_000_000, smoke=1000)
    steps: int = option(1000, "batches to learn from", min=1, smoke=40)
    batch_size: int = option(1024, "pairs of a word and a context in a step", min=1, smoke=256)
    dimensions: int = option(32, "of a vector", min=2)
    window: int = option(4, "words before and behind a word that are its context", min=1, max=1000)
    negatives: int = option(5, "K, words drawn by chance for each pair", min=1)
    subsample: float = option(
        0.01, "share of the text above which a word is left out at random, so that rare ones count more", above=0
    )
    learning_rate: float = option(
        0.01, "step size of Adam at the start; it falls to 0 in a line", above=0, max=1000, alias="--lr"
    )
    log_every: int = option(20, "steps between two points of the training loss", min=1, smoke=5, resume=True)
    test_every: int = option(50, "steps between two counts of neighbours and analogies", min=1, smoke=20, resume=True)
    picture_every: int = option(250, "steps between pictures, tables and points for the Projector; there are always "
                                "some at the end", min=1, resume=True)  # fmt: skip
    threads: int = option(1, "threads of the CPU; 0: as many as cores, which this is too small for", min=0, max=1024,
                          resume=True)  # fmt: skip
    seed: int = option(1, "seed of the text, the vectors, and the order of the pairs", min=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", check="rlboard.devices:check_device")
    deterministic: bool = option(False, "equal runs on a GPU too, at the price of speed")


def train(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Trains, and yields an event at step 0 and after every step; the x axis counts steps.

    With the `state` of an earlier event it goes on behind that, and the first event is at its step.

    Raises:
        UsageError: there is no such device (before the first event).
        NumericalError: the loss is NaN or infinite.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed, config.deterministic)
    device = resolve_device(config.device)
    text = sentences(config.sentences, config.seed)
    corpus = read_corpus(text, config.window, config.subsample, torch.Generator().manual_seed(config.seed))
    vocabulary = Vocabulary(corpus)
    pairs, noise = corpus.pairs.to(device), corpus.counts.to(device).float() ** 0.75
    model = SkipGram(len(corpus.words), config.dimensions).to(device)
    optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
    chance = torch.Generator(device).manual_seed(config.seed)
    step = 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        chance.set_state(state["chance"])

    def snapshot() -> dict[str, Any]:
        learned = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        return {**learned, "step": step, "chance": chance.get_state()}

    def draw(count: int, generator: torch.Generator) -> Tensor:
        """Words, contexts and others, (count, 2 + K)."""
        chosen = torch.randint(len(pairs), (count,), generator=generator, device=device)
        others = torch.multinomial(noise, count * config.negatives, replacement=True, generator=generator)
        return torch.cat((pairs[chosen], others.view(count, -1)), dim=1)

    about = f"text: {len(text):,} sentences, {sum(map(len, text)):,} words, {len(corpus.words)} of them different"
    example = "\n".join(f"- {' '.join(sentence)}" for sentence in text[:20])
    yield Event(
        step,
        config.steps,
        model=model,
        inputs=draw(64, torch.Generator(device).manual_seed(0)),
        notice=about,
        texts={"Words/text": lambda: example},
        state=snapshot,
    )

    while step < config.steps:
        with record_function("data"):
            inputs = draw(config.batch_size, chance)
        with record_function("forward"):
            loss = negative_sampling_loss(model(inputs))
        with record_function("backward"):
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        with record_function("optimizer"):
            rate = config.learning_rate * (1 - step / config.steps)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        step += 1
        last = step == config.steps
        scalars: dict[str, float] = {}
        message = headline = ""
        if step == 1 or step % config.log_every == 0 or last:
            scalars = {"Loss/train_step": finite(loss, step), "Learning_Rate": rate, "time/steps": step}
        if step % config.test_every == 0 or last:
            headline = "Accuracy/neighbours"
            neighbours, analogies = vocabulary.scores(model.vectors.weight)
            scalars |= {headline: neighbours, "Accuracy/analogies": analogies}
            message = f"step {step}: nearest neighbours {neighbours:.1f} % alike, analogies {analogies:.1f} % right"
        offered: dict[str, Any] = {}
        if step % config.picture_every == 0 or last:
            offered = {
                "model": model,
                "images": {
                    "Words/pca": partial(vocabulary.picture, model.vectors.weight),
                    "Words/capitals": partial(vocabulary.capitals_picture, model.vectors.weight),
                },
                "texts": {
                    "Words/neighbours": partial(vocabulary.neighbour_table, model.vectors.weight),
                    "Words/analogies": partial(vocabulary.analogy_table, model.vectors.weight),
                },
                "embeddings": {"Word_Embeddings": partial(vocabulary.points, model.vectors.weight)},
            }
        yield Event(step, config.steps, scalars, headline, message, state=snapshot, **offered)
