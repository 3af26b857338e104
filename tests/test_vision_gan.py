"""`rlboard vision gan`: its equations against direct computation, a smoke run read back, and that it learns."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from rlboard.checkpoint import read_run
from rlboard.cli import main
from rlboard.errors import UsageError
from vision._data import Dataset, Split, channel_statistics
from vision._diffaugment import CHANGES, diffaugment
from vision._frechet import Gaussian, fit, frechet_distance, mean_distance
from vision._gan import GAN, NOISE, Discriminator, Generator
from vision._judge import Judge, train_judge
from vision._samples import COLUMNS, Wish, draw, grid, interpolation, likeness, sample
from vision.gan import Config, gradient_penalties, train

pytestmark = [pytest.mark.usefixtures("few_shapes", "one_thread"), pytest.mark.xdist_group("gan")]  # one run for all

Capture = pytest.CaptureFixture[str]

RUN = "vision/gan/smoke"
LOOKS = [0, 2, 4, 6]
SMALL: dict[str, Any] = {
    "data": "shapes", "images": 64, "batch_size": 8, "width": 2, "judge_images": 64, "quality_images": 8, "threads": 1
}  # fmt: skip
SMOKE = ["vision", "gan", "--smoke", "--steps=6", "--judge-every=2", "--threads=1"]


@pytest.fixture(scope="module")
def log_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gan") / "logs"
    assert main([*SMOKE, "--conditional", "--run-name=smoke", "--log-dir", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def events(log_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(log_dir / RUN), {"scalars": 0, "tensors": 0, "images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def test_what_a_run_says_in_numbers(events: EventAccumulator) -> None:
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        *("Loss/generator", "Loss/discriminator", "Penalty/r1", "Penalty/r2"),
        *("Learning_Rate/generator", "Learning_Rate/discriminator", "Best/quality_score", "time/images_per_second"),
    }
    for tag in ("Quality/feature_distance", "Quality/score", "Quality/diversity"):
        assert [event.step for event in events.Scalars(tag)] == LOOKS
    (floor,) = events.Scalars("Quality/real_distance")
    for distance, score in zip(
        events.Scalars("Quality/feature_distance"), events.Scalars("Quality/score"), strict=True
    ):
        assert score.value == pytest.approx(floor.value / distance.value, rel=1e-4)
    losses = {event.step: event.value for event in events.Scalars("Loss/discriminator")}
    assert losses[1] == pytest.approx(np.log(2), abs=0.4), "it knows nothing yet"


def test_what_a_run_shows(events: EventAccumulator) -> None:
    for tag, rows in (("Generated/samples", 10), ("Generated/interpolation", 4)):
        pictures = events.Images(tag)
        assert [each.step for each in pictures] == LOOKS
        assert Image.open(io.BytesIO(pictures[-1].encoded_image_string)).size == (8 * 33 + 1, rows * 33 + 1)
    assert [each.step for each in events.Histograms("Scores/real")] == LOOKS[1:]
    assert events.Histograms("Scores/fake")[-1].histogram_value.num == 16
    names = {tag.split("/")[1].split(".")[0] for tag in events.Tags()["histograms"] if tag.startswith("Gradients/")}
    assert names == {"generator", "discriminator"}
    assert events.Tags()["graph"]
    graph = events.Graph().SerializeToString().decode(errors="replace")
    assert all(part in graph for part in ("Generator[generator]", "Discriminator[discriminator]"))


def test_a_checkpoint_draws_the_samples_that_were_logged(log_dir: Path, events: EventAccumulator) -> None:
    """They are of the averaged weights, and of the same noise in every look."""
    saved = read_run(str(log_dir / RUN))
    assert saved.state is not None
    generator = Generator(3, 32, width=8, classes=10)
    average = {name.removeprefix("module."): each for name, each in saved.state["average"].items()}
    generator.load_state_dict({name: each for name, each in average.items() if name != "n_averaged"})
    logged = np.array(Image.open(io.BytesIO(events.Images("Generated/samples")[-1].encoded_image_string)))
    drawn = draw(generator, grid(10, torch.Generator().manual_seed(0)))
    assert np.abs(drawn.astype(int) - logged).max() <= 1, "but for rounding in another memory layout"


class Linear(nn.Module):
    """D(x) = w . x, whose gradient is w everywhere."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, images: Tensor) -> Tensor:
        return (images * self.weights).sum(dim=(1, 2, 3))


def test_the_penalty_of_a_linear_discriminator_is_the_square_of_its_weights() -> None:
    network = Linear(torch.randn(3, 4, 4))
    images = torch.randn(5, 3, 4, 4, requires_grad=True)
    penalties = gradient_penalties(network(images), images)
    torch.testing.assert_close(penalties, network.weights.square().sum().expand(5))
    penalties.mean().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(network.weights.grad, 2 * network.weights.detach())


def test_the_penalty_of_the_discriminator_is_that_of_finite_differences() -> None:
    network = Discriminator(1, 16, width=2, classes=3).double()
    images, labels = torch.randn(2, 1, 16, 16, dtype=torch.float64), torch.tensor([0, 2])
    leaf = images.clone().requires_grad_()
    found = gradient_penalties(network(leaf, labels), leaf)
    steps = 1e-6 * torch.eye(256, dtype=torch.float64).view(256, 1, 16, 16)
    with torch.no_grad():
        for image, label, penalty in zip(images, labels, found, strict=True):
            slopes = (network(image + steps, label.expand(256)) - network(image - steps, label.expand(256))) / 2e-6
            assert penalty.item() == pytest.approx(slopes.square().sum().item(), rel=1e-4)


def test_the_losses_are_those_of_the_equations() -> None:
    _, event = train(Config(**SMALL, steps=1))
    real, fake = (event.histograms[name]() for name in ("Scores/real", "Scores/fake"))
    expected = np.log1p(np.exp(np.asarray(fake) - np.asarray(real))).mean()
    assert event.scalars["Loss/discriminator"] == pytest.approx(expected, rel=1e-5)


def test_without_a_step_size_both_losses_come_from_the_same_scores() -> None:
    """The generator's is the discriminator's with the two sides exchanged: l(t) - l(-t) = t, on fixed networks."""
    *_, event = train(Config(**SMALL | {"batch_size": 64}, steps=1, learning_rate=1e-30))
    real, fake = (np.asarray(event.histograms[name]()) for name in ("Scores/real", "Scores/fake"))
    difference = event.scalars["Loss/discriminator"] - event.scalars["Loss/generator"]
    assert difference == pytest.approx((fake - real).mean(), rel=1e-4)


@pytest.mark.parametrize(("channels", "side", "smallest"), [(1, 28, 7), (3, 32, 4), (3, 24, 6), (3, 64, 4), (1, 20, 5)])
def test_every_size_that_is_a_multiple_of_four(channels: int, side: int, smallest: int) -> None:
    gan = GAN(channels, side, width=2)
    noise = torch.randn(3, NOISE)
    images = gan.generator(noise)
    assert images.shape == (3, channels, side, side)
    assert images.abs().max() <= 1
    assert gan.generator.seed(noise).shape[-1] == gan.discriminator.down(images).shape[-1] == smallest
    assert gan(noise).shape == (3,)
    assert not [module for module in gan.modules() if isinstance(module, nn.ConvTranspose2d)]


@pytest.mark.parametrize("side", [12, 30, 33])
def test_other_sizes_are_refused(side: int) -> None:
    with pytest.raises(UsageError, match=f"images of {side} pixels"):
        GAN(3, side, width=2)


def test_a_class_moves_the_image_and_the_score_by_its_embedding() -> None:
    gan = GAN(3, 16, width=2, classes=4)
    noise = torch.randn(1, NOISE).expand(4, -1)
    images = gan.generator(noise, torch.arange(4))
    assert len({image.sum().item() for image in images}) == 4
    assert gan.discriminator.embedding is not None
    image = torch.randn(1, 3, 16, 16).expand(4, -1, -1, -1)
    scores = gan.discriminator(image, torch.arange(4))
    features = gan.discriminator.down(image[:1]).flatten()
    plain = gan.discriminator.score(features).squeeze()
    torch.testing.assert_close(scores, plain + gan.discriminator.embedding.weight @ features)


def test_diffaugment_keeps_shapes_and_lets_gradients_through() -> None:
    images = torch.rand(64, 3, 16, 16, requires_grad=True)
    for policy in (*CHANGES, "color,translation,cutout"):
        changed = diffaugment(images, policy, torch.Generator().manual_seed(1))
        assert changed.shape == images.shape
        assert not torch.equal(changed, images)
        (gradients,) = torch.autograd.grad(changed.sum(), images)
        assert gradients.abs().sum() > 0
        again = diffaugment(images, policy, torch.Generator().manual_seed(1))
        assert torch.equal(changed, again)
    assert diffaugment(images, "none", torch.Generator()) is images


def test_each_change_is_what_it_says() -> None:
    chance = torch.Generator().manual_seed(0)
    images = torch.rand(200, 1, 16, 16) + 1  # no pixel is 0
    moved = CHANGES["translation"](images, chance)
    corners = {
        (tuple((image[0] == 0).all(dim=1).tolist()), tuple((image[0] == 0).all(dim=0).tolist())) for image in moved
    }
    assert len(corners) == 25, "two pixels up to two pixels down, and left to right"
    for before, after in zip(images[:20], moved[:20], strict=True):
        kept = after[after != 0]
        assert torch.isin(kept, before).all()
    holes = (CHANGES["cutout"](images, chance) == 0).sum(dim=(1, 2, 3))
    assert holes.max() == 8 * 8, "a quarter of the image where it lies in it"
    assert holes.min() >= 4 * 4
    gray = CHANGES["color"](torch.full((50, 3, 4, 4), 0.25), chance)
    assert (gray.std(dim=(1, 2, 3)) < 1e-6).all(), "no contrast and no saturation to change"
    assert gray.mean(dim=(1, 2, 3)).min() >= -0.25
    assert gray.mean(dim=(1, 2, 3)).max() <= 0.75


def test_the_frechet_distance_of_diagonal_gaussians_is_known() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2 where the covariances are diagonal with deviations s."""
    one = Gaussian(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double())
    other = Gaussian(torch.tensor([3.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 16.0])).double())
    assert frechet_distance(one, other) == pytest.approx(9 + 1 + 1)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-10)


def test_the_frechet_distance_does_not_depend_on_order_or_rotation_and_takes_singular_covariances() -> None:
    one, other = torch.randn(30, 6), 2 * torch.randn(4, 6) + 1  # the covariance of four points has rank three
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    distance = frechet_distance(fit(one), fit(other))
    assert distance > 0
    assert frechet_distance(fit(other), fit(one)) == pytest.approx(distance)
    assert frechet_distance(fit(one @ rotation), fit(other @ rotation)) == pytest.approx(distance, rel=1e-5)
    product = fit(one).covariance @ fit(other).covariance  # the trace of its root, by another way
    roots = torch.linalg.eigvals(product).real.clamp(min=0).sqrt().sum()
    means = (fit(one).mean - fit(other).mean).square().sum()
    assert distance == pytest.approx(float(means + one.double().var(0).sum() + other.double().var(0).sum() - 2 * roots))
    assert mean_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0]])) == pytest.approx(10 / 3)


def dataset(images: int = 256) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    split = Split(
        torch.randint(0, 256, (images, 1, 16, 16), dtype=torch.uint8, generator=generator),
        torch.arange(images) % 2,
    )
    half = images // 2
    train_split, test_split = (
        Split(split.images[part], split.labels[part]) for part in (slice(half), slice(half, None))
    )
    return Dataset("noise", ("a", "b"), train_split, test_split, *channel_statistics(split.images))


def test_the_judge_knows_real_images_a_collapse_and_other_images() -> None:
    data = dataset()
    before = torch.get_rng_state()
    judge = Judge.of(train_judge(data, 128), data, 128)
    assert torch.equal(torch.get_rng_state(), before), "the GAN's chance is its own"
    again = train_judge(data, 128)
    assert all(map(torch.equal, judge.model.state_dict().values(), again.state_dict().values()))
    real = judge.scores(data.test.images)
    assert real["Quality/feature_distance"] == pytest.approx(judge.real_distance)
    assert real["Quality/diversity"] == pytest.approx(1)
    collapsed = judge.scores(data.test.images[:1].expand(64, -1, -1, -1))
    assert collapsed["Quality/diversity"] == pytest.approx(0, abs=1e-5)
    assert collapsed["Quality/feature_distance"] > real["Quality/feature_distance"]
    assert collapsed["Quality/score"] < real["Quality/score"]


def test_samples_are_of_the_same_noise_and_a_class_has_a_row() -> None:
    chance = torch.Generator()
    assert torch.equal(grid(0, chance.manual_seed(0)).noise, grid(0, chance.manual_seed(0)).noise)
    noise, labels = grid(3, chance)
    assert labels is not None
    assert labels.view(3, COLUMNS)[:, 0].tolist() == [0, 1, 2]
    assert (labels.view(3, COLUMNS) == labels.view(3, COLUMNS)[:, :1]).all()
    assert torch.equal(noise[:COLUMNS], noise[-COLUMNS:])
    way = interpolation(0, chance).noise.view(4, COLUMNS, NOISE)
    assert torch.allclose(way.norm(dim=2).mean(), torch.tensor(10.0), atol=1)
    lengths = way.norm(dim=2)
    assert (lengths > 0.8 * lengths[:, :1]).all(), "not shorter half way"
    known = torch.tensor([1, 1, 1, 0])
    wished = likeness(known, 4000, chance).labels
    assert wished is not None
    assert wished.double().mean().item() == pytest.approx(0.75, abs=0.05)


def test_pixels_are_the_range_of_tanh() -> None:
    def generator(noise: Tensor, _: None) -> Tensor:
        return noise[:, :3].view(-1, 3, 1, 1).clamp(-1, 1)

    noise = torch.tensor([[-1.0, 0.0, 1.0]])
    images = sample(generator, Wish(noise, None))  # type: ignore[arg-type]
    assert images.dtype == torch.uint8
    assert images.flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--batch-size=400"], 2, "--batch-size 400 is more than the 320 training images"),
        (["--judge=nowhere"], 2, "--judge nowhere: "),
        (["--images=1", "--batch-size=2"], 2, "--batch-size 2 is more than the 1 training images"),
        (["--width=0"], 2, "--width 0 is out of range"),
        (["--augment=everything"], 2, "--augment everything is not"),
        (["--lr=1e30"], 4, "try a smaller --learning-rate"),
    ],
)
def test_mistakes_are_one_line(options: list[str], code: int, words: str, tmp_path: Path, capsys: Capture) -> None:
    assert main([*SMOKE, "--log=minimal", "--log-dir", str(tmp_path), *options]) == code
    error = capsys.readouterr().err.strip()
    assert words in error
    assert len(error.splitlines()) == 1


def folder(root: Path, side: int) -> Path:
    """A data set of its own: eight grey images of two classes, to learn from and to test with."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            for number in range(4):
                path = root / "grey" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (side, side), (number * 60,) * 3).save(path)
    return root / "grey"


def test_images_of_another_size_are_refused(tmp_path: Path, capsys: Capture) -> None:
    data = [f"--data={folder(tmp_path, 30)}", f"--data-dir={tmp_path}", "--batch-size=4"]
    assert main([*SMOKE, "--log-dir", str(tmp_path / "logs"), *data]) == 2
    assert "images of 30 pixels" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_a_run_of_train_is_the_judge_of_its_own_data_alone(tmp_path: Path, capsys: Capture) -> None:
    logs = ["--threads=1", "--log=minimal", "--log-dir", str(tmp_path)]
    assert main(["vision", "train", "--smoke", "--images=64", "--no-tta", "--run-name=judge", *logs]) == 0
    judge = f"--judge={tmp_path}/vision/train/judge"
    assert main([*SMOKE, *logs, judge, "--steps=1", "--run-name=judged"]) == 0
    saved = read_run(str(tmp_path / "vision/gan/judged"))
    assert saved.state is not None
    assert saved.state["judge"] is None, "it is on the disk"
    data = [f"--data={folder(tmp_path, 16)}", f"--data-dir={tmp_path}", "--batch-size=4"]
    assert main([*SMOKE, *logs, judge, *data]) == 2
    assert "it was trained on shapes, not on grey: give another run" in capsys.readouterr().err
    assert main([*SMOKE, *logs, f"--judge={tmp_path}/vision/gan/judged"]) == 2
    assert "give a run of rlboard vision train" in capsys.readouterr().err


class FakeMetric:
    """What torchmetrics' two metrics look like from outside; counts what it is shown."""

    def __init__(self, subset_size: int = 0) -> None:
        self.subset_size, self.seen = subset_size, {True: 0, False: 0}

    def to(self, _: torch.device) -> FakeMetric:
        return self

    def update(self, images: Tensor, real: bool) -> None:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        self.seen[real] += len(images)

    def compute(self) -> Any:
        found = torch.tensor(float(self.seen[True] * 1000 + self.seen[False]))
        return (found, torch.zeros(())) if self.subset_size else found


@pytest.fixture
def torchmetrics(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for torchmetrics, whose two classes download Inception's weights; it need not be installed."""
    module = SimpleNamespace(FrechetInceptionDistance=FakeMetric, KernelInceptionDistance=FakeMetric)
    for name in ("torchmetrics", "torchmetrics.image", "torchmetrics.image.fid", "torchmetrics.image.kid"):
        monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.usefixtures("torchmetrics")
def test_fid_and_kid_are_asked_of_torchmetrics() -> None:
    config = Config(**SMALL, steps=1, fid=True, fid_images=50)
    *_, last = train(config)
    assert last.scalars["Quality/fid"] == last.scalars["Quality/kid"] == 50 * 1000 + 50


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ModuleNotFoundError("no torch-fidelity"), 2, 'python -m pip install -e ".[fid]"'),
        (OSError("no network"), 3, "the weights of Inception cannot be had (no network)"),
    ],
)
def test_fid_that_cannot_be_had_is_said_before_training(
    error: Exception, code: int, words: str, tmp_path: Path, torchmetrics: SimpleNamespace, capsys: Capture
) -> None:
    def fail() -> None:
        raise error

    torchmetrics.FrechetInceptionDistance = fail
    assert main([*SMOKE, "--fid", "--log-dir", str(tmp_path / "logs")]) == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_few_images_are_augmented_and_the_weights_stay_in_float32(tmp_path: Path) -> None:
    data = {"data": str(folder(tmp_path, 20)), "data_dir": str(tmp_path), "batch_size": 4}
    config = Config(**SMALL | data, steps=41, judge_every=40, precision="bfloat16", conditional=True, log_every=1)
    first, *others = train(config)
    assert "DiffAugment: color,translation,cutout" in first.notice
    assert all(np.isfinite(list(event.scalars.values())).all() for event in others)
    assert first.model is not None
    assert {parameter.dtype for parameter in first.model.parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.usefixtures("all_shapes")
def test_it_learns_the_shapes(tmp_path: Path) -> None:
    """The feature distance falls by half; a minute and a half of a CPU."""
    options = ["--data=shapes", "--steps=1400", "--width=8", "--lr=2e-3", "--judge-images=5000", "--quality-images=500"]
    options += ["--judge-every=700", "--run-name=a", "--log=minimal"]
    assert main(["vision", "gan", *options, "--log-dir", str(tmp_path)]) == 0
    accumulator = EventAccumulator(str(tmp_path / "vision/gan/a"))
    accumulator.Reload()
    distances = [event.value for event in accumulator.Scalars("Quality/feature_distance")]
    assert distances[-1] < distances[0] / 2
    for tag in ("Loss/generator", "Loss/discriminator"):
        assert max(event.value for event in accumulator.Scalars(tag)) < 10


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_trains_on_a_gpu(tmp_path: Path) -> None:
    options = ["--smoke", "--preset=gpu", "--device=cuda", "--conditional", "--run-name=a"]
    assert main(["vision", "gan", *options, "--log-dir", str(tmp_path)]) == 0
    accumulator = EventAccumulator(str(tmp_path / "vision/gan/a"))
    accumulator.Reload()
    assert np.isfinite([event.value for event in accumulator.Scalars("Loss/generator")]).all()
