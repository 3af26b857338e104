"""Train a GAN: a generator draws images from noise, a discriminator learns to tell them from real ones.

For real images x and generated ones G(z), each compared with its partner in the batch (a relativistic pairing), the
discriminator D lowers the first loss and the generator G the second, with l(t) = log(1 + exp(t)):

    L_D = E[ l(D(G(z)) - D(x)) ] + gamma / 2 (R1 + R2),    R1 = E |grad D(x)|^2,    R2 = E |grad D(G(z))|^2
    L_G = E[ l(D(x) - D(G(z))) ]

Only differences of scores count: D cannot be content with one boundary between all real and all generated images, and
the loss has no bad local minima in which G draws a few modes only. Alone it still diverges. With a zero-centred
penalty it provably converges near the solution; R1 alone leaves D's slope at generated images free, and in the paper's
experiments it explodes there, which R2 prevents. Normalisation layers and other tricks against divergence, without
which older GANs do not train, are then not needed.

The samples are of the generator's weights averaged over training. `Quality/feature_distance` is the squared Fréchet
distance between generated and real images in the features of one of our own classifiers, the judge: it is comparable
between runs with an equal judge, and is no FID, which `--fid` computes at the end. Under torchrun each process takes
its part of every batch; the changes of `--augment` are then drawn for a part, and are the same for each.

Sources: N. Huang et al., "The GAN is dead; long live the GAN! A Modern Baseline GAN", 2024, arXiv:2501.05441 (R3GAN);
A. Jolicoeur-Martineau, "The relativistic discriminator", 2018, arXiv:1807.00734; R. Sun et al., "Towards a Better
Global Loss Landscape of GANs", 2020, arXiv:2011.04926 (the minima); L. Mescheder et al., "Which Training Methods for
GANs do actually Converge?", 2018, arXiv:1801.04406 (the penalties); the networks and augmentations name theirs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.profiler import record_function

from rlboard.config import option
from rlboard.devices import peak_memory, resolve_device
from rlboard.distributed import average_gradients, equalise, sum_over, world
from rlboard.errors import UsageError
from rlboard.events import Event
from rlboard.seeding import seed_everything
from vision._data import Batches, Dataset, load_dataset
from vision._diffaugment import diffaugment
from vision._gan import GAN, NOISE
from vision._judge import Inception, Judge, find_judge
from vision._optimizers import averaged, finite
from vision._samples import draw, grid, interpolation, likeness, sample


@dataclass(frozen=True)
class Config:
    data: str = option("auto", "auto, cifar10, mnist, shapes, or the path of a folder or archive of train/CLASS/*",
                       smoke="shapes", check="vision._data:check_data")  # fmt: skip
    data_dir: str = option("", "where downloads and decoded images are kept (default: the user's cache)",
                          resume=True)  # fmt: skip
    images: int = option(0, "use only so many images for training, and for testing; 0: all", min=0, smoke=320)
    steps: int = option(2000, "updates of both networks", min=1, smoke=20)
    batch_size: int = option(32, "images in a step", min=2, smoke=16)
    width: int = option(16, "channels at full size; the deeper the more, up to eight times", min=1, max=1024, smoke=8)
    conditional: bool = option(False, "learn each class by its name: images can be asked for by class")
    learning_rate: float = option(1e-3, "of both networks, by Adam", above=0, max=1e30, alias="--lr")
    gamma: float = option(0.5, "weight of the gradient penalties R1 and R2", min=0)
    ema: float = option(
        0.995, "decay of the generator's averaged weights, which the samples are of", min=0, max=0.99999
    )
    augment: str = option("auto", "DiffAugment, for little data; auto: where an image is seen over 20 times",
                          choices=("auto", "none", "translation,cutout", "color,translation,cutout"))  # fmt: skip
    flip: bool = option(True, "mirror real images in every other epoch (never MNIST's digits)")
    judge: str = option("", "run of vision train on the same data that judges the images (default: trains one)")
    judge_images: int = option(15_000, "images that a judge is trained on, twice", min=2, smoke=128)
    quality_images: int = option(2000, "images that are generated to be judged", min=2, max=100_000, smoke=64)
    fid: bool = option(False, "FID and KID by Inception's features at the end; needs the extra fid")
    fid_images: int = option(10_000, "images for FID and KID, real and generated", min=2, smoke=64)
    precision: str = option("auto", "of the generator's update; auto: bfloat16 on CUDA",
                            choices=("auto", "float32", "bfloat16"))  # fmt: skip
    compile: bool = option(False, "torch.compile the generator (not what is differentiated twice)")
    log_every: int = option(20, "steps between two points of the losses", min=1, smoke=5, resume=True)
    judge_every: int = option(0, "steps between two looks at the images; 0: a tenth of the training", min=0,
                             resume=True)  # fmt: skip
    threads: int = option(
        0, "threads of the CPU; 0: as many as cores; fewer cost less CPU time in all", min=0, max=1024, resume=True
    )
    seed: int = option(1, "seed of the weights, the noise, and the order of the images", min=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", check="rlboard.devices:check_device")
    deterministic: bool = option(False, "equal runs on a GPU too, at the price of speed")


PRESETS: dict[str, dict[str, int | float | str | bool]] = {
    "laptop": {"steps": 2000, "batch_size": 32, "width": 16},
    "gpu": {"steps": 50_000, "batch_size": 256, "width": 64, "learning_rate": 2e-4, "gamma": 0.05, "ema": 0.9995,
            "quality_images": 10_000, "judge_images": 50_000, "compile": True},
}  # fmt: skip

LITTLE = 20
"""How often an image may be seen before the discriminator knows it by heart, and --augment auto changes it."""
BETAS = (0.0, 0.99)
"""Adam's: R3GAN begins without momentum."""
DISTRIBUTED = True
"""Several processes can train it together."""


def about(dataset: Dataset, judge: Judge, augment: str) -> str:
    """What is trained on and how it is judged, in a few lines."""
    size = "x".join(map(str, dataset.train.images.shape[1:]))
    facts = f"data: {dataset.name}, {len(dataset.train.labels):,} training images, {size}; DiffAugment: {augment}"
    floor = f"judge: test images have a feature distance of {judge.real_distance:.4g} to training images, the floor"
    return "\n".join(filter(None, (dataset.notice, facts, floor)))


def gradient_penalties(scores: Tensor, images: Tensor) -> Tensor:
    """|grad D(x)|^2 of each image (N,), in float32; it can be differentiated again.

    `scores` (N,) are D's of `images`, which require gradients and of which each has decided its own score alone.
    """
    (gradients,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradients.float().square().sum(dim=(1, 2, 3))


def endless(batches: Batches, done: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of epoch after epoch, without the first `done` of the first one."""
    while True:
        yield from islice(batches, done, None)
        done = 0


def train(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
    """Trains, and yields an event at step 0 and one after every step; the x axis counts updates of both networks.

    With the `state` of an earlier event it goes on behind that, and the first event is at its step.

    Raises:
        UsageError: the device, the images or the judge cannot be used with these options (before the first event).
        DataError: the data, the judge or Inception's weights cannot be had or read (before the first event).
        NumericalError: a loss is NaN or infinite.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_everything(config.seed, config.deterministic)
    device, here = resolve_device(config.device), world()
    dataset = load_dataset(config.data, config.data_dir, device).first(config.images)
    count, channels, image_size = dataset.train.images.shape[:3]
    if config.batch_size > count:
        raise UsageError(f"--batch-size {config.batch_size} is more than the {count:,} training images: give less")
    classes = len(dataset.classes) if config.conditional else 0

    gan = GAN(channels, image_size, config.width, classes).to(device).to(memory_format=torch.channels_last)
    equalise(gan)
    average = averaged(gan.generator, config.ema)
    generate = torch.compile(gan.generator) if config.compile else gan.generator
    optimizers = {
        name: torch.optim.Adam(network.parameters(), config.learning_rate, BETAS)
        for name, network in (("generator", gan.generator), ("discriminator", gan.discriminator))
    }
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)

    def chance(seed: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    order, random = chance(config.seed), chance(config.seed + 1)
    half = torch.full((channels,), 0.5)  # images in [-1, 1]
    flip = config.flip and dataset.name != "MNIST"
    batches = Batches(
        dataset.train, half, half, config.batch_size, augment=True, flip=flip, padding=0, generator=order,
        channels_last=True, world=here,
    )  # fmt: skip
    often = config.steps * config.batch_size > LITTLE * count
    policy = config.augment if config.augment != "auto" else "color,translation,cutout" if often else "none"
    augment = partial(diffaugment, policy=policy, generator=random)

    inception = Inception(device, min(config.fid_images, count)) if config.fid else None
    known = state["judge"] if state else None
    critic = find_judge(config.judge, dataset, config.data, config.data_dir, config.judge_images, known)
    judge = Judge.of(critic, dataset, config.quality_images)
    shown, ways = grid(classes, chance(0)), interpolation(classes, chance(1))
    names = dataset.train.labels if classes else None
    judged, inspected = (likeness(names, number, chance(2)) for number in (config.quality_images, config.fid_images))

    step = 0
    shuffled = order.get_state()  # as the epoch began
    if state:
        gan.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])
        step, shuffled = state["step"], state["shuffled"]
        random.set_state(state["random"])
        order.set_state(shuffled)
        batches.epoch = step // len(batches)

    def snapshot() -> dict[str, Any]:
        learned = {"model": gan.state_dict(), "average": average.state_dict()}
        learned |= {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        judges = {"judge": None if config.judge else critic.state_dict(), "data": dataset.name}
        return {**learned, **judges, "step": step, "shuffled": shuffled, "random": random.get_state()}

    def look(scalars: dict[str, float]) -> Event:
        """An event that says and shows what the images are like by now."""
        found = judge.scores(sample(average, judged))
        message = (
            f"step {step}/{config.steps}: feature distance {found['Quality/feature_distance']:.4g} "
            f"(test images {judge.real_distance:.3g}), diversity {found['Quality/diversity']:.2f}"
        )
        images = {
            "Generated/samples": partial(draw, average, shown),
            "Generated/interpolation": partial(draw, average, ways),
        }
        return Event(step, config.steps, scalars | found, "Quality/score", message, gan, images=images,
                     best="Best/quality_score", state=snapshot)  # fmt: skip

    begins = Event(step, config.steps, model=gan, state=snapshot)
    if not state:
        begins = look({"Quality/real_distance": judge.real_distance})
    yield replace(begins, inputs=shown.noise, notice=about(dataset, judge, policy))

    every = config.judge_every or max(1, config.steps // 10)
    for reals, classified in islice(endless(batches, step % len(batches)), config.steps - step):
        labels = classified if classes else None
        with record_function("forward"):
            noise = torch.randn(batches.batch_size, NOISE, generator=random, device=device)  # of all processes
            noise = noise[here.part(len(noise))]
            with autocast():
                fakes = generate(noise, labels)
            both = augment(torch.cat((reals, fakes.detach().float()))).requires_grad_()
            scores = gan.discriminator(both, None if labels is None else labels.repeat(2))
            real_scores, fake_scores = scores.chunk(2)
            discriminator_loss = softplus(fake_scores - real_scores).mean()
            r1, r2 = (each.mean() for each in gradient_penalties(scores, both).chunk(2))
        with record_function("backward"):
            optimizers["discriminator"].zero_grad()
            (discriminator_loss + config.gamma / 2 * (r1 + r2)).backward()  # type: ignore[no-untyped-call]
            average_gradients(gan.discriminator.parameters())
        with record_function("optimizer"):
            optimizers["discriminator"].step()

        with record_function("forward"), autocast():
            rivals = gan.discriminator(augment(fakes), labels)
            with torch.no_grad():
                partners = gan.discriminator(augment(reals), labels)
            generator_loss = softplus(partners - rivals).mean()
        with record_function("backward"):
            optimizers["generator"].zero_grad()
            weights = list(gan.generator.parameters())  # the discriminator's have no part in this
            generator_loss.backward(inputs=weights)  # type: ignore[no-untyped-call]
            average_gradients(weights)
        with record_function("optimizer"):
            optimizers["generator"].step()
            average.update_parameters(gan.generator)

        step += 1
        if step % len(batches) == 0:
            shuffled = order.get_state()
        last = step == config.steps
        scalars: dict[str, float] = {}
        if step == 1 or last or step % config.log_every == 0:
            parts = (each.detach() / here.size for each in (generator_loss, discriminator_loss, r1, r2))
            tags = ("Loss/generator", "Loss/discriminator", "Penalty/r1", "Penalty/r2")
            means = zip(tags, sum_over(*parts), strict=True)
            scalars = {
                **{tag: finite(mean, step) for tag, mean in means},
                **{f"Learning_Rate/{name}": each.param_groups[0]["lr"] for name, each in optimizers.items()},
                "Memory/total_GB": peak_memory(device),
                "time/images": step * config.batch_size,
            }
        if not last and step % every:
            yield Event(step, config.steps, scalars, state=snapshot)
            continue
        if last and inception:
            scalars |= inception.scores(dataset.train.first(config.fid_images).images, sample(average, inspected))
        histograms = {"Scores/real": real_scores.detach, "Scores/fake": fake_scores.detach}
        yield replace(look(scalars), histograms=histograms)
