"""`rlboard doctor`: each fault is made for real where that can be done, then found, with a line that mends it."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from rlboard import doctor
from rlboard.cli import main
from rlboard.doctor import Facts, Finding
from tests.browser import tensorboard

TORCH = """
__version__ = "2.15.0+cpu"
class version: cuda = None
class cuda: device_count = lambda: 0
class backends:
    class mps: is_available = lambda: False
zeros = lambda *_: None
"""
TWO_GPUS = """
class cuda:
    device_count = lambda: 2
    mem_get_info = lambda _: (1 << 30, 1 << 34)
    get_device_name = lambda _: "NVIDIA H200"
class Sum:
    __add__ = lambda self, _: self
    item = lambda self: 2.0
def ones(_, device):
    if device == BROKEN: raise RuntimeError("no kernel image is available")
    return Sum()
"""
TORCHVISION = """
from types import SimpleNamespace
version = SimpleNamespace()
__version__ = "0.29.2+cpu"
"""
CUDA_TORCHVISION = """
from types import SimpleNamespace
version = SimpleNamespace(cuda=13020)
__version__ = "0.29.2+cu132"
"""
NUMBA = """
__version__ = "0.68.1"
class config: DISABLE_JIT = 0
def njit(*_, **__):
"""
HEALTHY: dict[str, Facts] = {
    "torch_facts": {
        "torch": ["2.15.0", None],
        "torchvision": ["0.29.2", None],
        "devices": [],
        "warnings": [],
    },
    "tensorboard_facts": {"tensorboard": "2.21.0", "server": "0.7.2"},
    "numba_facts": {"numba": "0.68.1", "cache": "there"},
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that Python searches before all others, here and in its children."""
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(directory)
    return directory


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "in_child", lambda facts: HEALTHY[facts.__name__])


def package(site: Path, name: str, source: str, **modules: str) -> None:
    """A package that Python can import."""
    (site / name).mkdir()
    (site / name / "__init__.py").write_text(source)
    for module, text in modules.items():
        (site / name / f"{module}.py").write_text(text)


def distribution(site: Path, name: str, version: str, *requires: str) -> None:
    """What pip leaves behind of a package that it has installed."""
    directory = site / f"{name.replace('-', '_')}-{version}.dist-info"
    directory.mkdir()
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", "Requires-Python: >=3.11"]
    lines += [f"Requires-Dist: {each}" for each in requires]
    (directory / "METADATA").write_text("\n".join(lines) + "\n")


def is_problem(finding: Finding, code: int, found: str, mend: str) -> None:
    assert (finding.state, finding.exit_code) == ("problem", code), finding
    assert re.search(found, finding.found), finding.found
    assert re.search(mend, finding.mend), finding.mend


def is_note(finding: Finding, found: str, mend: str) -> None:
    assert finding.state == "note", finding
    assert re.search(found, finding.found), finding.found
    assert re.search(mend, finding.mend), finding.mend


# The command.


def test_the_command(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On this machine, all but torch, which takes seconds to import."""
    package(site, "torch", TORCH)
    package(site, "torchvision", TORCHVISION, ops="nms = print")
    logs = tmp_path / "logs"
    logs.mkdir()
    assert main(["doctor", "--logdir", str(logs), "--port", str(free_port()), "--json"]) == 0
    output, complaint = capsys.readouterr()
    assert complaint == ""
    assert list(logs.iterdir()) == []
    rows = {row["check"]: row for row in json.loads(output)}
    assert list(rows) == [
        *("Python", "packages", "torch", "devices", "TensorBoard", "numba", "other packages"),
        *("memory", "log directory", "disk space", "open files", "port"),
    ]
    for row in rows.values():
        assert list(row) == ["check", "state", "found", "mend"]
        assert row["state"] == "ok" or row["check"] in ("devices", "TensorBoard", "open files"), row
    assert rows["torch"]["found"].startswith("torch 2.15.0+cpu and torchvision 0.29.2+cpu, both for no CUDA")
    assert re.search(r"^numba \S+ compiles; its cache is .*pycache", rows["numba"]["found"])
    assert rows["TensorBoard"]["found"].startswith(f"tensorboard {metadata.version('tensorboard')}")


@pytest.mark.slow
def test_the_real_torch() -> None:
    import torch

    facts = doctor.in_child(doctor.torch_facts)
    finding = doctor.one_build(facts)
    assert finding.state == "ok"
    assert finding.found.startswith(f"torch {torch.__version__} and torchvision 0.")
    assert doctor.devices(facts).found.count("cuda:") == torch.cuda.device_count()


@pytest.mark.usefixtures("no_children")
def test_a_pipe_gets_plain_text_of_80_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(doctor, "SLOW_DISK", 1e15)
    (tmp_path / "[bold]").touch()
    assert main(["doctor", "--logdir", str(tmp_path / "[bold]")]) == 5
    output, _ = capsys.readouterr()
    lines = output.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in output
    assert "[bold]" in output
    assert re.search(r"^✗ problem +log directory +\S", output, re.MULTILINE)
    assert re.search(r"^ +mend: give another --logdir", output, re.MULTILINE)
    assert re.search(r"^✓ ok +Python +3\.", output, re.MULTILINE)
    assert lines[-1].startswith("1 problem")


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize(
    ("checks", "code"),
    [
        ({}, 0),
        ({"memory": "note"}, 0),
        ({"disk_space": 5}, 5),
        ({"memory": 6, "disk_space": 5}, 6),
        ({"packages": 2, "memory": 6}, 2),
    ],
)
def test_the_exit_code_is_that_of_the_first_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checks: dict[str, int | str], code: int
) -> None:
    for name in ("packages", "memory", "log_directory", "disk_space"):
        monkeypatch.setattr(doctor, name, lambda *_: Finding("good"))
    for name, state in checks.items():
        finding = Finding("broken", "mend it", state if isinstance(state, int) else 0)
        monkeypatch.setattr(doctor, name, lambda *_, finding=finding: finding)
    assert main(["doctor", "--logdir", str(tmp_path)]) == code


@pytest.mark.parametrize("arguments", [["--port", "0"], ["--port", "65536"], ["--port", "x"], ["--jsn"]])
def test_a_mistake_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    output, complaint = capsys.readouterr()
    assert (output, complaint.count("\n")) == ("", 1)


def test_what_a_check_did_not_expect_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Finding:
        raise RuntimeError("a\nb")

    for name in ("in_child", "python", "packages", "namesakes", "memory", "write_speed", "disk_space", "open_files"):
        monkeypatch.setattr(doctor, name, broken)
    findings = dict(doctor.diagnose(tmp_path, free_port()))
    assert len(findings) == 12
    for name, finding in findings.items():
        if name != "port":
            is_note(finding, r"could not be checked: RuntimeError: a\\nb", "mend the other findings")
    assert findings["port"].state == "ok"


def test_marks_are_left_out_where_they_cannot_be_written() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    doctor.show({"port": Finding("taken", "another"), "memory": Finding("5 GB")}, Console(file=file, width=80))
    file.seek(0)
    assert [line.split() for line in file.read().splitlines()] == [
        ["note", "port", "taken"],
        ["mend:", "another"],
        ["ok", "memory", "5", "GB"],
        ["1", "note"],
    ]


# The installation.


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    is_problem(doctor.python(), 2, r"^3\.10\.4", r"install Python >=3\.11")


def test_all_packages_are_here() -> None:
    finding = doctor.packages()
    assert finding.state == "ok", finding
    assert re.search(r"torch \d.*, pillow \d", finding.found)


def test_an_old_package(site: Path) -> None:
    distribution(site, "torchinfo", "0.1")
    found = "^rlboard needs torchinfo>=1.8, but 0.1 is installed$"
    is_problem(doctor.packages(), 2, found, r'^\S.* install "torchinfo>=1\.8"$')


def test_a_package_that_another_one_cannot_work_with(site: Path) -> None:
    distribution(site, "numba", "0.70", "numpy<2.0", 'nowhere; extra == "gpu"', 'nowhere; python_version < "3"')
    is_problem(doctor.packages(), 2, r"^numba needs numpy<2\.0, but \S+ is installed$", r'install "numpy<2\.0"$')


def test_an_old_torch_is_not_mended_without_torchvision(site: Path) -> None:
    distribution(site, "torch", "2.1.0")
    is_problem(
        doctor.packages(),
        2,
        "rlboard needs torch>=2.10, but 2.1.0",
        "^\\S.* uninstall torch torchvision, .*pytorch.org",
    )


def test_packages_that_are_missing_and_installed_twice(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a rlboard that does not run from its sources: its own metadata say what it needs."""
    monkeypatch.setattr(doctor, "ROOT", site)
    distribution(site, "rlboard", "9.0", "no-such-package>=1", "two_fold[big]", 'pytest>=99; extra == "test"')
    for version in ("1.0", "1.1"):
        distribution(site, "Two.Fold", version, 'no-other-package; extra == "big"')
    finding = doctor.packages()
    is_problem(finding, 2, "rlboard needs no-such-package>=1, but none is installed", 'install "no-such-package>=1"')
    is_problem(finding, 2, "two_fold needs no-other-package, but none", '"no-other-package"')
    is_problem(
        finding, 2, r"over each other: Two.Fold 1\.\d and Two.Fold 1\.\d", "uninstall two_fold, until none is left"
    )
    assert "pytest" not in finding.found


BUILDS = {
    "import": (TORCH, 'raise RuntimeError("operator torchvision::nms does not exist")', "",
               "torch 2.15.0.cpu works, but torchvision .*RuntimeError: operator torchvision::nms does not exist"),
    "operator": (TORCH, TORCHVISION, 'def nms(*_): raise RuntimeError("Couldn\'t load custom C++ ops")',
                 "but torchvision .*load custom C"),
    "CUDA": (TORCH, CUDA_TORCHVISION, "nms = print",
             r"torch 2\.15\.0\+cpu and torchvision 0\.29\.2\+cu132 are of different builds"),
    "local": (TORCH.replace("+cpu", "+rocm7"), TORCHVISION, "nms = print", "of different builds"),
    "torch": ('raise ImportError("libtorch_cpu.so: undefined symbol:\\nx")', "", "",
              "torch cannot be used: ImportError: libtorch_cpu.so: undefined symbol"),
    "crash": ("import os; os.abort()", "", "", "torch cannot be used: Python was killed by SIGABRT"),
    "crash of torchvision": (TORCH, "import os, signal; os.kill(os.getpid(), signal.SIGILL)", "",
                             "but torchvision .*: Python was killed by SIGILL"),
    "exit": ("import sys; sys.exit(3)", "", "", "torch cannot be used: exit code 3"),
}  # fmt: skip


@pytest.mark.parametrize(("torch", "torchvision", "operators", "found"), BUILDS.values(), ids=BUILDS)
def test_a_broken_torch(site: Path, torch: str, torchvision: str, operators: str, found: str) -> None:
    package(site, "torch", torch)
    package(site, "torchvision", torchvision, ops=operators)
    facts = doctor.in_child(doctor.torch_facts)
    is_problem(doctor.one_build(facts), 2, found, "uninstall torch torchvision, then install both .* pytorch.org")
    if "torch cannot" in found:
        is_note(doctor.devices(facts), "^CPU, .* cores usable; GPUs unknown", "mend torch first")


def test_one_build_of_torch(site: Path) -> None:
    package(site, "torch", "print('{not ours')" + TORCH.replace("+cpu", "").replace("cuda = None", "cuda = '13.2'"))
    package(site, "torchvision", CUDA_TORCHVISION, ops="nms = print")
    finding = doctor.one_build(doctor.in_child(doctor.torch_facts))
    assert finding.state == "ok", finding
    assert "both for CUDA 13.2" in finding.found


def test_a_torch_that_never_answers(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHILD_SECONDS", 0.5)
    package(site, "torch", "import time; time.sleep(60)")
    is_problem(doctor.one_build(doctor.in_child(doctor.torch_facts)), 2, "no answer within 0.5 s", "uninstall torch")


@pytest.mark.parametrize("broken", ["cuda:1", "none"])
def test_gpus(site: Path, broken: str) -> None:
    package(site, "torch", TORCH + TWO_GPUS.replace("BROKEN", repr(broken)))
    package(site, "torchvision", TORCHVISION, ops="nms = print")
    finding = doctor.devices(doctor.in_child(doctor.torch_facts))
    assert "cuda:0 NVIDIA H200, 1.0 GB of 16.0 GB free; cuda:1 NVIDIA H200, 1.0 GB of 16.0 GB free" in finding.found
    if broken == "none":
        assert finding.state == "ok"
    else:
        is_problem(
            finding, 2, r"free, which fails: no kernel image is available$", "use --device cpu, or .*pytorch.org"
        )


@pytest.mark.parametrize(
    ("cuda", "mend"), [("13.2", "driver to one for CUDA 13.2"), (None, "to use it, .*pytorch.org")]
)
def test_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, cuda: str | None, mend: str) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    facts = {"torch": ["2.15", cuda], "devices": [], "warnings": ["the driver is too old"]}
    is_note(doctor.devices(facts), "GPU that torch does not see: the driver is too old$", mend)


def test_two_tensorboards(site: Path) -> None:
    distribution(site, "tb-nightly", "2.22.0a1")
    found = r"^tensorboard \S+ and tb-nightly 2\.22\.0a1 are installed over each other$"
    mend = "uninstall tb-nightly tensorboard, until none is left, then .* install tensorboard$"
    is_problem(doctor.tensorboard(HEALTHY["tensorboard_facts"]), 2, found, mend)


def test_a_tensorboard_installed_over_an_older_one(site: Path) -> None:
    for version in ("2.20.0", "2.21.0"):
        distribution(site, "tensorboard", version)
    facts = HEALTHY["tensorboard_facts"]
    is_problem(doctor.tensorboard(facts), 2, "tensorboard 2.2.* and tensorboard 2.2.* over each other", "uninstall")


def test_a_tensorboard_that_hides_another_is_one(site: Path) -> None:
    distribution(site, "tensorboard", "2.99")
    assert doctor.tensorboard(HEALTHY["tensorboard_facts"]).state == "ok"


def test_a_tensorboard_that_cannot_be_imported(site: Path) -> None:
    package(site, "tensorboard", "", program="raise TypeError('Descriptors cannot be created directly.')")
    package(site / "tensorboard", "compat", "")
    package(site / "tensorboard/compat", "proto", "", event_pb2="")
    finding = doctor.tensorboard(doctor.in_child(doctor.tensorboard_facts))
    is_problem(finding, 2, "TypeError: Descriptors cannot be created", "install --force-reinstall tensorboard$")


SERVERS = {
    "none for this system": "server_binary = lambda: None",
    "PermissionError": "server_binary = lambda: __file__",
    "CalledProcessError": "server_binary = lambda: '/bin/false'",
    "ImportError: not here": "raise ImportError('not here')",
}


@pytest.mark.parametrize(("found", "source"), SERVERS.items(), ids=SERVERS)
def test_a_data_server_that_does_not_run(site: Path, found: str, source: str) -> None:
    package(site, "tensorboard", "", program="", version="VERSION = '2.21'")
    package(site / "tensorboard", "compat", "")
    package(site / "tensorboard/compat", "proto", "", event_pb2="")
    package(site, "tensorboard_data_server", source)
    finding = doctor.tensorboard(doctor.in_child(doctor.tensorboard_facts))
    is_note(finding, rf"^tensorboard 2\.21 loads many runs slowly, .*{found}", "reinstall tensorboard-data-server")


def test_numba_without_a_place_for_its_cache(site: Path) -> None:
    error = "cannot cache function 'int32_of': no locator available for file 'scan.py'"
    package(site, "numba", f"{NUMBA}    raise RuntimeError({error!r})")
    finding = doctor.numba(doctor.in_child(doctor.numba_facts))
    is_note(finding, f"slowly: RuntimeError: {error}$", "^set NUMBA_CACHE_DIR to a directory that you may write$")


def test_numba_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    is_note(doctor.numba(doctor.in_child(doctor.numba_facts)), "switched off", "^unset NUMBA_DISABLE_JIT$")


def test_a_broken_numba(site: Path) -> None:
    package(site, "numba", "raise ImportError('Numba needs NumPy 2.3 or less. Got NumPy 2.4.')")
    finding = doctor.numba(doctor.in_child(doctor.numba_facts))
    is_note(finding, "slowly: ImportError: Numba needs NumPy 2.3 or less", "install --upgrade numba$")


def test_namesakes_do_no_harm(site: Path) -> None:
    assert doctor.namesakes().state == "ok"
    package(site, "agents", "")
    (site / "vision").mkdir()  # without a source it cannot hide ours
    is_note(doctor.namesakes(), f"^agents in {re.escape(str(site / 'agents'))}$", "^nothing: .* no harm$")


# The machine.


def test_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(doctor, "CONTAINER_LIMITS", (str(limit),))
    limit.write_text("314572800\n")
    is_problem(doctor.memory(), 6, r"^0.3 GB available$", "end other programs: a run takes about 1.0 GB$")
    limit.write_text("max\n")
    assert doctor.memory().exit_code in (0, 6)
    assert "0.3 GB" not in doctor.memory().found


@pytest.mark.parametrize("name", ["file", "file/below/it", "dangling"])
def test_a_log_directory_that_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    finding = doctor.log_directory(tmp_path / name)
    is_problem(finding, 5, "(file|dangling) is no directory$", "give another --logdir, or move that file away")


def test_a_log_directory_that_is_not_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finding = doctor.log_directory(Path("로그/🏆"))
    assert finding.state == "ok"
    assert finding.found.startswith(f"로그/🏆 (not there yet; measured in {tmp_path}): writable, ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", [(os, "fsync"), (tempfile, "TemporaryFile")], ids=lambda broken: broken[1])
def test_a_log_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: tuple[object, str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(*broken, fail)
    finding = doctor.log_directory(tmp_path)
    is_problem(finding, 5, "cannot be written: Read-only file system$", "make .* writable for you, or give another")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a directory that not even root may write")
def test_a_log_directory_that_nobody_may_write() -> None:
    is_problem(doctor.log_directory(Path("/proc/runs")), 5, "cannot be written", "give another --logdir")


def test_a_slow_disk_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def crawl(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        time.sleep(0.2)

    monkeypatch.setattr(os, "fsync", crawl)
    is_note(doctor.log_directory(tmp_path), r"writable, [1-9] MB/s$", "local disk")
    assert len(synced) <= 3
    assert synced[-1] < 2 << 20


def test_the_disk_is_measured_with_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(doctor, "TRIAL_SECONDS", 60)
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    assert doctor.write_speed(tmp_path) > 0
    assert doctor.TRIAL_BYTES <= sizes[-1] <= 2 * doctor.TRIAL_BYTES


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> tuple[int, int, int]:
        asked.append(path)
        return shutil._ntuple_diskusage(1 << 40, 1 << 40, 300 << 20)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    finding = doctor.disk_space(tmp_path / "not/there")
    is_problem(finding, 5, "^0.3 GB of 1,024.0 GB free$", "free some space, or give a --logdir")
    assert asked == [tmp_path]


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1 << 20))
    is_note(doctor.open_files(), "only 256", "^ulimit -n 4096$")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert doctor.open_files() == Finding("without limit")


# The port.


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


@contextlib.contextmanager
def answering(status: int, body: bytes) -> Iterator[int]:
    """The port of a web server that always answers this."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server.server_port
        server.shutdown()


def test_a_port_that_a_tensorboard_is_on(tmp_path: Path) -> None:
    with tensorboard(tmp_path) as address:
        port = int(address.rpartition(":")[2])
        found = f"^{port} is taken by a TensorBoard that shows {re.escape(str(tmp_path))}$"
        is_note(doctor.port_is_free(port), found, "give another --port; rlboard dashboard takes the next free one")
    assert doctor.port_is_free(port).state == "ok"


@pytest.mark.parametrize(
    ("status", "body"), [(404, b"no"), (200, b"[]"), (200, b"{}"), (200, b"\xff"), (401, b'{"data": 1}')]
)
def test_a_port_that_another_web_server_is_on(status: int, body: bytes) -> None:
    with answering(status, body) as port:
        is_note(doctor.port_is_free(port), rf"^{port} is taken by a web server \(BaseHTTP/\S+ Python/\S+\)$", "--port")


def test_a_port_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ANSWER_SECONDS", 0.1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        is_note(doctor.port_is_free(port), f"^{port} is taken by a program that is no web server$", "--port")
        server.listen()
        is_note(doctor.port_is_free(port), "no web server", "--port")


def test_a_port_that_only_root_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    is_note(doctor.port_is_free(80), "^80 may not be used by you$", "from 1024 on")
