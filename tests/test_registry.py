import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from rlboard.config import options_of
from rlboard.registry import ROOT, TRACKS, Loop, SourceError, Track, read_loop

LOOPS = [loop for track in TRACKS for loop in track.loops()]
CONFIG = """
from dataclasses import dataclass
from rlboard.config import option
@dataclass(frozen=True)
class Config:
"""


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_what_is_read_from_the_source_is_what_is_imported(loop: Loop) -> None:
    module = loop.load()
    assert options_of(module.Config) == loop.options
    assert getattr(module, "PRESETS", {}) == loop.presets
    assert loop.defaults() == {option.name: getattr(module.Config(), option.name) for option in loop.options}


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name)
def test_a_preset_and_smoke_change_only_defaults(loop: Loop) -> None:
    names = {option.name for option in loop.options}
    for preset, replaced in loop.presets.items():
        assert set(replaced) <= names
        assert loop.defaults(preset) == loop.defaults() | dict(replaced)
        for option in loop.options:
            option.validate(loop.defaults(preset)[option.name])
    assert set(loop.defaults(smoke=True)) == names


def test_a_run_directory_is_named_as_the_field_names_the_agent() -> None:
    assert Track("agents").directory("reinforce") == Path("REINFORCE")
    assert Track("vision", group="vision").directory("train") == Path("vision/train")


def test_helpers_are_no_loops(tmp_path: Path) -> None:
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/_helper.py").write_text("x = 1")
    (tmp_path / "zoo/b.py").write_text(CONFIG + "    steps: int = option(1, 'steps')")
    (tmp_path / "zoo/a.py").write_text('"""Doc."""' + CONFIG + "    steps: int = option(1, help='steps', min=-1)")
    first, second = Track("zoo", root=tmp_path).loops()
    assert (first.name, first.doc, first.options[0].min, second.name) == ("a", "Doc.", -1, "b")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("x = 1", "needs a dataclass `Config`"),
        ("def broken(:", "1: "),
        (CONFIG + "    steps: list = option([], 'steps')", "not list"),
        (CONFIG + "    steps: int = option(10 * 10, 'steps')", "10 * 10 is not a literal"),
        (CONFIG + "    steps: int = option(1, 'steps', minimum=1)", "minimum"),
        (CONFIG + "    steps: int = option(1)", "help"),
    ],
)
def test_a_file_that_is_no_loop_is_refused_by_line(source: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "loop.py"
    path.write_text(source)
    with pytest.raises(SourceError, match=r"loop\.py") as refusal:
        read_loop(Track("any"), path)
    assert complaint in str(refusal.value)


def imports(path: Path) -> set[str]:
    """Every module that a source file imports, anywhere in it."""
    return imports_of(ast.parse(path.read_bytes()))


def imports_of(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


LOOP_VOCABULARY = {"checkpoint", "config", "devices", "distributed", "errors", "events", "seeding"}
ABOUT_OTHER_LOOPS = {
    "agents/evaluate.py": {"registry", "statistics"},  # says whose runs it can read, and how surely
    "agents/_environments.py": {"registry"},  # says which agents fit an environment
}


def test_loops_import_only_their_vocabulary_and_never_the_other_track() -> None:
    for track, other in (("agents", "vision"), ("vision", "agents")):
        for path in (ROOT / track).glob("*.py"):
            vocabulary = LOOP_VOCABULARY | ABOUT_OTHER_LOOPS.get(f"{track}/{path.name}", set())
            for name in imports(path):
                parts = name.split(".")
                assert parts[0] != other, f"{path} imports {name}"
                assert parts[0] != "rlboard" or parts[1] in vocabulary, f"{path} imports {name}"


def test_the_plumbing_never_imports_a_loop() -> None:
    for path in (ROOT / "rlboard").rglob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] in {"agents", "vision"}}, path


def test_eventfile_stands_alone() -> None:
    for path in (ROOT / "rlboard/eventfile").glob("*.py"):
        foreign = {name for name in imports(path) if name.startswith(("torch", "rlboard"))}
        assert {name for name in foreign if not name.startswith("rlboard.eventfile")} == set(), path


def test_there_are_no_import_circles() -> None:
    modules = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
        for folder in ("rlboard", "agents", "vision")
        for path in (ROOT / folder).rglob("*.py")
    }

    def imported(name: str) -> set[str]:
        """What is imported when the module is used: all but the imports for type checking."""
        tree = ast.parse(modules[name].read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        around = {name, name.rpartition(".")[0]}  # a module's package is there before it
        return imports_of(tree) & set(modules) - around

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in imported(name):
                visit(other, (*above, name))
            done.add(name)

    done: set[str] = set()
    for name in modules:
        visit(name, ())


def calls(path: Path, name: str) -> bool:
    names = (
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call)
    )
    return name in names


def test_only_the_writer_makes_a_summary_writer() -> None:
    for folder in ("rlboard", "agents", "vision"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name != "writer.py":
                assert "torch.utils.tensorboard.SummaryWriter" not in imports(path), path
                assert not calls(path, "SummaryWriter"), path


def test_the_command_line_answers_before_anything_heavy_is_imported() -> None:
    script = """
import sys
from rlboard.cli import main
for words in ("--help", "vision --help", "reinforce --help", "reinforce --gamma 7", "evaluate"):
    main(words.split())
    if heavy := {"torch", "gymnasium", "tensorboard", "numpy", "numba"} & set(sys.modules):
        sys.exit(f"{words} has imported {heavy}")
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_another_package_called_agents_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents/__init__.py").write_text("raise ImportError('the wrong agents')")
    script = f"""
import sys
from rlboard.registry import TRACKS
sys.modules["torch"] = None  # it takes seconds to import: our agents fail because of it, the others at once
try:
    next(TRACKS[0].loops()).load()
except ModuleNotFoundError as error:
    assert error.name == "torch", error
assert list(sys.modules["agents"].__path__) == [{str(ROOT / "agents")!r}]
"""
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, check=True)


def test_loading_twice_is_one_module() -> None:
    (loop, *_) = LOOPS
    assert loop.load() is importlib.import_module(f"{loop.track.package}.{loop.name}")
