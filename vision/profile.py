"""Profile a few steps of training: how much of one is data, forward, backward and optimizer, and which operators.

    rlboard vision profile --model resnet18
    rlboard vision profile --model resnet18 --no-channels-last

`record_function("forward")` gives a stretch of code a name, which costs some microseconds and does nothing more. While
`torch.profiler` records, it becomes a span on the same clock as every operator, its shapes and its memory:

    step 1 wait: the first step allocates, and compiles; it says nothing about the others
    step 2 warm-up: the profiler's own start, thrown away
    steps 3 to 5 active: recorded
    steps 6 to 10: the same once more, from which one sees how far to trust it

The traces land in the run's folder `profile`, for the Profile tab, ui.perfetto.dev or chrome://tracing; the means in
`Profile/<span>_ms`, the longest operators in the text `Profile/operators`. A GPU works behind the CPU: there a span is
how long it takes to ask for the work, and `synchronize` how long one then waits for it. Profiling takes time itself, so
that images per second are those of a profiled step. Whichever loop one has, `--profile` does the same for its steps.

Source: "PyTorch Profiler", docs.pytorch.org/docs/stable/profiler.html.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, repeat

import torch
from torch.nn import functional
from torch.profiler import record_function

from rlboard.config import option
from rlboard.devices import peak_memory, resolve_device
from rlboard.events import Event
from rlboard.seeding import seed_everything
from vision._data import Batches, load_dataset
from vision._models import build_model
from vision._optimizers import make_optimizer
from vision._winograd import with_winograd

PROFILED = True
"""What is run here is recorded without being asked for."""


@dataclass(frozen=True)
class Config:
    model: str = option("laptopnet", "network",
                        choices=("laptopnet", "speednet", "resnet9", "resnet18", "simplecnn", "vit"))  # fmt: skip
    width: int = option(0, "channels of the first stage; 0: the network's own", min=0, max=4096, smoke=8)
    data: str = option("shapes", "auto, cifar10, mnist, shapes, or the path of a folder or archive of train/CLASS/*",
                       check="vision._data:check_data")  # fmt: skip
    data_dir: str = option("", "where downloads and decoded images are kept (default: the user's cache)")
    images: int = option(2000, "use only so many images; 0: all", min=0, smoke=64)
    batch_size: int = option(128, "images in a step", min=1, smoke=32)
    optimizer: str = option("muon", "how the weights move", choices=("sgd", "adamw", "muon"))
    precision: str = option("auto", "of the forward pass; auto: bfloat16 on CUDA",
                            choices=("auto", "float32", "bfloat16"))  # fmt: skip
    compile: bool = option(False, "torch.compile: a slow start, then faster steps on a GPU")
    channels_last: bool = option(True, "pixels of all channels side by side in memory, as convolutions like it")
    steps: int = option(10, "steps to train, of which the first ten are profiled", min=3)
    threads: int = option(0, "threads of the CPU; 0: as many as cores", min=0, max=1024)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", check="rlboard.devices:check_device")


def train(config: Config) -> Iterator[Event]:
    """Trains, and yields an event at step 0 and after every step.

    Raises:
        UsageError: the device or the images cannot be used with these options (before the first event).
        DataError: the data cannot be had or read (before the first event).
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    seed_everything(0)
    device = resolve_device(config.device)
    dataset = load_dataset(config.data, config.data_dir, device).first(config.images)
    split = dataset.train
    batches = Batches(
        split, dataset.mean, dataset.std, config.batch_size, augment=True, channels_last=config.channels_last
    )
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    channels, image_size = split.images.shape[1], split.images.shape[-1]
    model = build_model(
        config.model, classes=len(dataset.classes), channels=channels, image_size=image_size, width=config.width
    )
    with_winograd(model.to(device).to(memory_format=layout))
    network = torch.compile(model) if config.compile else model
    optimizer = make_optimizer(model, config.optimizer, 1e-3)
    bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=bfloat16)

    size = "x".join(map(str, split.images.shape[1:]))
    facts = f"{config.model}, {sum(parameter.numel() for parameter in model.parameters()):,} parameters"
    about = f"{facts}, on {batches.batch_size} images of {size} a step ({dataset.name})"
    yield Event(0, config.steps, notice=f"{dataset.notice}\n{about}" if dataset.notice else about)

    endless = chain.from_iterable(repeat(batches))  # whose spans are called `data`
    began = time.perf_counter()
    for step, (inputs, labels) in enumerate(islice(endless, config.steps), start=1):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with record_function("forward"):
            with autocast():
                logits = network(inputs)
            loss = functional.cross_entropy(logits.float(), labels)
        forward_memory = peak_memory(device)
        with record_function("backward"):
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        with record_function("optimizer"):
            optimizer.step()
        with record_function("synchronize"):
            loss_value = loss.item()
        scalars = {
            "Loss/train_step": loss_value,
            "Memory/forward_GB": forward_memory,
            "Memory/total_GB": peak_memory(device),
            "time/images_per_second": batches.batch_size / (time.perf_counter() - began),
        }
        yield Event(step, config.steps, scalars, "time/images_per_second", best="best/images_per_second")
        began = time.perf_counter()  # not before: a trace may have been written
