"""`rlboard vision train`: loading, convolutions, what logging costs, accuracy over seeds, a bound and a peer.

    python -m benchmarks.vision                                        # all that needs no data
    python -m benchmarks.vision --data cifar10 --only laptop           # one preset: accuracy and CPU time of each seed
    python benchmarks/vision.py --device cuda --airbench PATH          # all of a GPU's, on CIFAR-10 without --data

Accuracies are those of the data that is given: name it beside the number. Trainings on the CPU use one thread, which
costs the least CPU time in all. On a GPU seconds are those of the clock on the wall, read when the device has done what
it was given, after a training of one epoch that compiles; each contender is measured once, over ten seeds. PATH is a
copy of airbench94_muon.py, in turn with which `speedrun` runs; `benchmarks/_airbench.py` says what is timed.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if not __package__:  # run as a file, whose folder hides the package `vision`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._airbench import check_script, in_turn, our_training, synchronize
from benchmarks.harness import Benchmark, Function, Measurement, Stopwatch, main
from rlboard.cli import main as rlboard
from rlboard.devices import keep_freed_memory, resolve_device
from rlboard.errors import RlboardError
from rlboard.events import Event
from vision import train as module
from vision._data import Batches, load_dataset
from vision._models import build_model
from vision._optimizers import make_optimizer
from vision._winograd import with_winograd
from vision.train import PRESETS, Config

CPU_PRESETS = ("laptop", "patient")
CUDA_PRESETS = ("speedrun", "lesson", "accurate")
SMALL = {"images": 640, "epochs": 1, "width": 8}


def our_batches(epochs: int, batch_size: int, cutout: int) -> Measurement:
    torch.set_num_threads(1)
    data = load_dataset("shapes")
    batches = Batches(data.train, data.mean, data.std, batch_size, augment=True, cutout=cutout, channels_last=True)
    watch = Stopwatch()
    for _ in range(epochs):
        for _ in batches:
            pass
    return watch.stop(work=epochs * len(batches) * batch_size)


def torchvision_batches(epochs: int, batch_size: int, cutout: int) -> Measurement:
    """In this process: worker processes hide the time, they do not save it."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.transforms.functional import to_pil_image

    torch.set_num_threads(1)
    data = load_dataset("shapes")
    steps = [
        transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(data.mean.tolist(), data.std.tolist()),
    ]
    if cutout:
        area = (cutout / 32) ** 2
        steps.append(transforms.RandomErasing(p=1, scale=(area, area), ratio=(1, 1)))
    transform = transforms.Compose(steps)
    pairs = [(to_pil_image(image), int(label)) for image, label in zip(*data.train, strict=True)]

    class Images(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
        def __len__(self) -> int:
            return len(pairs)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image, label = pairs[index]
            return transform(image), label

    loader = DataLoader(Images(), batch_size, shuffle=True, drop_last=True)
    watch = Stopwatch()
    for _ in range(epochs):
        for _ in loader:
            pass
    return watch.stop(work=epochs * len(loader) * batch_size)


def steps(width: int, count: int, convolutions: Callable[[nn.Module], nn.Module]) -> Measurement:
    """Trains LaptopNet on the same batch of 128 images again and again."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command does
    torch.manual_seed(0)
    images = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (len(images),))
    model = convolutions(build_model("laptopnet", classes=10, width=width).to(memory_format=torch.channels_last))
    optimizer = make_optimizer(model, "muon", 0.03, normalize_filters=True)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    step()
    watch = Stopwatch()
    for _ in range(count):
        step()
    return watch.stop(work=count * len(images))


def unchanged(model: nn.Module) -> nn.Module:
    """`model`."""
    return model


def logged(options: dict[str, Any], level: str) -> Measurement:
    """Trains by the command line; logging is what happens outside of the loop, from the first event on.

    Counted in CPU seconds on the CPU, on the wall elsewhere: there the device's work goes on beside the process's.
    """
    original, inside, begun = module.train, 0.0, 0.0

    def now() -> float:
        if options["device"] == "cpu":
            return time.process_time()
        synchronize(options["device"])
        return time.perf_counter()

    def timed(config: Config, state: Mapping[str, Any] | None = None) -> Iterator[Event]:
        nonlocal inside, begun
        events = original(config, state)
        yield next(events)  # the data are there
        begun = now()
        while True:
            start = now()
            event = next(events, None)
            inside += now() - start
            if event is None:
                return
            yield event

    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    module.train = timed
    watch = Stopwatch()
    code = rlboard(["vision", "train", *arguments, f"--log={level}"])
    whole = now() - begun
    if code:
        raise RuntimeError(f"rlboard vision train ended with exit code {code}")
    share = 100 * (whole / inside - 1)
    return watch.stop(work=1, **{"training_s": inside, "logging_s": whole - inside, "logging_%": share})


def seeds(options: dict[str, Any], count: int) -> Measurement:
    """Trains `count` seeds; the columns are the accuracies and what a training took, without data and imports."""
    if options["device"] != "cpu":
        our_training(options | {"seed": 0, "epochs": 1})
    trainings = [our_training(options | {"seed": seed}) for seed in range(1, count + 1)]
    accuracies = [training.accuracy for training in trainings]
    wholes = [training.whole for training in trainings]
    seconds = [whole.cpu_seconds if options["device"] == "cpu" else whole.wall_seconds for whole in wholes]
    return Measurement(
        count,
        sum(whole.cpu_seconds for whole in wholes),
        sum(whole.wall_seconds for whole in wholes),
        extra={
            "mean %": statistics.fmean(accuracies),
            "without TTA": statistics.fmean(training.plain for training in trainings),
            "lowest %": min(accuracies),
            "highest %": max(accuracies),
            "median s": statistics.median(seconds),
            "images per s": wholes[0].work / statistics.median(seconds),
        },
    )


def bounded(options: dict[str, Any], side: int, copied: int) -> Measurement:
    """Trains ResNet-18; the columns are its images per second, without tests, and what bounds them on this device.

    No training is faster than its multiplications at the rate of a product of two matrices of side `side`, nor than
    its activations at the rate at which `copied` bytes are copied. Both rates are measured here, in the precision of
    the training, and so is what a direct convolution has to do; see `demand`.
    """
    device = torch.device(options["device"])
    half = device.type == "cuda"  # as `--precision auto` has it
    torch.set_num_threads(options["threads"] or torch.get_num_threads())
    our_training(options | {"seed": 0, "epochs": 1})
    training = our_training(options)

    dataset = load_dataset(options["data"])
    model = build_model(
        "resnet18", classes=len(dataset.classes), channels=dataset.train.images.shape[1], width=options.get("width", 0)
    )
    flops, elements = demand(model, dataset.train.images[:1])
    moved = elements * (2 if half else 4)
    products = multiplications_per_second(device, torch.bfloat16 if half else torch.float32, side)
    copies = bytes_per_second(device, copied)
    reached, bound = training.whole.work / training.seconds, images_per_second(flops, moved, products, copies)
    return dataclasses.replace(
        training.whole,
        training_seconds=None,
        extra={
            "images per s": reached,
            "bound": bound,
            "% of it": 100 * reached / bound,
            "GFLOP per image": flops / 1e9,
            "TFLOP/s": products / 1e12,
            "MB per image": moved / 1e6,
            "GB/s": copies / 1e9,
        },
    )


def images_per_second(flops: float, moved: float, flops_per_second: float, bytes_per_second: float) -> float:
    """The bound for an image of `flops` operations and `moved` bytes, where both overlap without end."""
    return 1 / max(flops / flops_per_second, moved / bytes_per_second)


def demand(model: nn.Module, images: Tensor) -> tuple[float, float]:
    """What a training step at least does for each of `images` (N, C, H, W): operations, and activations moved.

    Operations are those of convolutions and linear layers, forward and backward, a multiplication and an addition
    being two. Their outputs are activations that no cache holds for a whole batch: each is written, read by the next
    layer and, in the backward pass, once more; its gradient is written and read. The images are read twice. All else
    is taken to be fused into them, and the weights to be read once for all. The weights of `model` are lost.
    """
    sizes: list[int] = []
    model = model.to("meta")
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda _layer, _inputs, output: sizes.append(output.numel()))
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(images.shape, device="meta")).sum().backward()
    return counter.get_total_flops() / len(images), (5 * sum(sizes) + 2 * images.numel()) / len(images)


def multiplications_per_second(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Operations per second in the fastest of several products of two square matrices."""
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    return 2 * side**3 / shortest(lambda: left @ right, device)


def bytes_per_second(device: torch.device, size: int) -> float:
    """Bytes read and written per second in the fastest of several copies of `size` bytes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / shortest(lambda: target.copy_(source), device)


def shortest(function: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Seconds that the fastest of `repeats` calls took."""
    seconds = []
    for _ in range(repeats):
        synchronize(str(device))
        start = time.perf_counter()
        function()
        synchronize(str(device))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def benchmarks(
    quick: bool, data: str = "", device: str = "cpu", count: int = 0, airbench: Path | None = None
) -> list[Benchmark]:
    """`count`: seeds, 0 for 5 on the CPU and 10 elsewhere; `airbench`: its script."""
    on_cpu = device == "cpu"
    count = 1 if quick else count or (5 if on_cpu else 10)
    common: dict[str, Any] = {"device": device, "threads": int(on_cpu)}
    small: dict[str, Any] = dict(SMALL) if quick else {}
    logging = common | small | {"data": data or "shapes"} | ({} if on_cpu else {"preset": "lesson"})

    def trained(preset: str, **options: Any) -> dict[str, Any]:
        return {"compile": False} | PRESETS[preset] | common | options | small

    some = {"compile": False, "batch_size": 32 if quick else 128, "images": 640, "epochs": 1} if on_cpu else {}
    resnet18 = trained("accurate", data="shapes", tta=False, **({"epochs": 4} | some))
    side, copied = (4096, 2**28) if on_cpu else (8192, 2**31)
    return [
        *(loading(quick, cutout) for cutout in (0, 8) if on_cpu),
        *(convolving(quick, width) for width in (32, 48, 96) if on_cpu),
        Benchmark(
            "logging",
            "training",
            [
                Function("--log minimal", partial(logged, logging, "minimal")),
                Function("--log full", partial(logged, logging, "full")),
            ],
            f"the {logging.get('preset', 'default')} training on {Path(logging['data']).name}, {device}",
        ),
        Benchmark(
            "resnet18",
            "image",
            [Function("rlboard", partial(bounded, resnet18, 512 if quick else side, 2**24 if quick else copied))],
            f"a training in batches of {resnet18['batch_size']}, {device}",
        ),
        *(
            Benchmark(
                preset,
                "training",
                [Function("rlboard", partial(seeds, trained(preset, data=data), count))],
                f"--preset {preset} on {Path(data).name}, {device}, {count} seeds",
            )
            for preset in (CPU_PRESETS if on_cpu else CUDA_PRESETS)
            if data
        ),
        *(
            Benchmark(
                "airbench94",
                "training",
                [Function("rlboard", partial(in_turn, script, trained("speedrun", data=data), count))],
                f"--preset speedrun and airbench94 in turn on {Path(data).name}, {device}, {count} seeds",
            )
            for script in [airbench]
            if script and data
        ),
    ]


def loading(quick: bool, cutout: int) -> Benchmark:
    epochs, batch_size = (1, 512) if quick else (5, 256)
    return Benchmark(
        "loading-cutout" if cutout else "loading",
        "image",
        [
            Function("rlboard", partial(our_batches, epochs, batch_size, cutout)),
            Function("torchvision", partial(torchvision_batches, 1, batch_size, cutout)),
        ],
        f"20,000 images: crop, flip, {'cutout, ' if cutout else ''}normalise, batches of {batch_size}",
    )


def convolving(quick: bool, width: int) -> Benchmark:
    count = 2 if quick else 20
    return Benchmark(
        f"convolutions-{width}",
        "image",
        [
            Function("rlboard", partial(steps, width, count, with_winograd)),
            Function("torch's", partial(steps, width, count, unchanged)),
        ],
        f"steps of laptopnet of width {width} on 128 images",
    )


def command_line(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--airbench", type=Path)
    own, others = parser.parse_known_args(argv)
    try:
        device = str(resolve_device(own.device))
        script = check_script(own.airbench) if own.airbench else None
        data = own.data or ("" if device == "cpu" else "shapes" if "--quick" in others else "cifar10")
        if data:
            print(load_dataset(data).about, flush=True)
    except RlboardError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if data and Path(data).exists():
        data = str(Path(data).absolute())  # each contender runs in a directory of its own
    if script and not device.startswith("cuda"):
        parser.error("--airbench needs --device cuda")
    repeats = [] if device == "cpu" else ["--repeats=1"]
    chosen = partial(benchmarks, data=data, device=device, count=own.seeds, airbench=script)
    return main(chosen, [*repeats, *others])


if __name__ == "__main__":
    raise SystemExit(command_line(sys.argv[1:]))
