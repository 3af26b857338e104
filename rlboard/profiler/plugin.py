"""The plugin itself: the tab Profile, its page, and what the page asks for.

TensorBoard loads this module at every start, so it imports nothing that TensorBoard has not loaded anyway; what reads
traces is imported once a trace is asked for. A request names one of the traces that `rlboard.profiler.find` has found.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard.backend.http_util import Respond
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from werkzeug import Request, Response
from werkzeug.utils import send_file

from rlboard.errors import DataError
from rlboard.profiler.find import TraceFile, TraceList

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

    from rlboard.profiler.traces import Trace

PAGE = Path(__file__).with_name("page")
TYPES = {".js": "text/javascript", ".css": "text/css"}
MOST_MEMORY = 1 << 29
"""Bytes of traces kept; the one last asked for is kept whatever its size."""
PATIENCE = 0.5
"""Seconds after which a request for a trace that is still being read is answered with how far that is."""


class Plugin(TBPlugin):  # type: ignore[misc]  # TensorBoard has no types
    """The tab Profile of the log directory that TensorBoard was started with."""

    plugin_name = "rlboard_profile"

    def __init__(self, context: TBContext) -> None:
        self._traces = TraceList(context.logdir or "")
        self._shelf = Shelf()

    def is_active(self) -> bool:
        return not self._traces.is_empty()

    def frontend_metadata(self) -> FrontendMetadata:
        return FrontendMetadata(es_module_path="/index.js", tab_name="Profile")

    def get_plugin_apps(self) -> dict[str, WSGIApplication]:
        assets = {f"/{path.name}": _asset(path) for path in PAGE.iterdir() if path.suffix in TYPES}
        return {
            **assets,
            "/traces": _answering(self._list),
            "/overview": _answering(self._view("overview")),
            "/operators": _answering(self._view("operators", by_shape=_flag)),
            "/timeline": _answering(self._view("timeline", begin=_time, end=_time, pixels=_pixels, text=str)),
            "/find": _answering(self._view("find", text=str, time=_time, backwards=_flag)),
            "/event": _answering(self._view("event", number=int)),
            "/memory": _answering(self._view("memory")),
            "/download": Request.application(self._download),
        }

    def _list(self, _: Request) -> Any:
        runs: dict[str, list[dict[str, Any]]] = {}
        for trace in self._traces.get(patience=5).values():
            runs.setdefault(trace.run, []).append({"name": trace.name, "size": trace.size, "modified": trace.modified})
        return [{"run": run, "traces": traces} for run, traces in runs.items()]

    def _view(self, name: str, **parameters: Callable[[str], Any]) -> Callable[[Request], Any]:
        """A function of `rlboard.profiler.views`, its arguments taken from the query."""

        def answer(request: Request) -> Any:
            arguments = {key: kind(request.args.get(key, "")) for key, kind in parameters.items()}
            trace = self._shelf.get(self._named(request))
            from rlboard.profiler import views

            return getattr(views, name)(trace, **arguments)

        return answer

    def _named(self, request: Request) -> TraceFile:
        """The trace that a request means. Raises LookupError where none has that name."""
        key = (request.args.get("run", ""), request.args.get("trace", ""))
        found = self._traces.get(patience=0)
        if key not in found:
            found = self._traces.get(patience=5)
        if key not in found:
            raise LookupError("there is no such trace: it may have been moved since the page was loaded")
        return found[key].now()

    def _download(self, request: Request) -> Response:
        """The file itself, to be opened in Perfetto."""
        try:
            trace = self._named(request)
            name = f"{trace.run}-{Path(trace.name).name}".replace("/", "_")
            packed = trace.path.suffix == ".gz"
            answer: Response = send_file(
                trace.path,
                request.environ,
                mimetype="application/gzip" if packed else "application/json",
                as_attachment=True,
                download_name=name,
            )
        except (LookupError, OSError):
            answer = Response("there is no such trace\n", 404, content_type="text/plain")
        answer.headers["X-Content-Type-Options"] = "nosniff"
        return answer


class StillReadingError(Exception):
    """A trace has been read up to this part of it, from 0 to 1."""


class Shelf:
    """The traces that were asked for last, read in the background, one at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()
        self._readings: OrderedDict[tuple[str, int, int], Reading] = OrderedDict()

    def get(self, file: TraceFile) -> Trace:
        """The trace.

        Raises:
            StillReadingError: that takes longer.
            DataError: it is none.
        """
        with self._lock:
            reading = self._readings.get(file.version)
            if reading is None:
                reading = self._readings[file.version] = Reading(file.path, self._one_at_a_time)
            self._readings.move_to_end(file.version)
        reading.thread.join(PATIENCE)
        ended = not reading.thread.is_alive()
        if reading.error:
            raise DataError(reading.error)
        if reading.trace is None:
            if ended:
                raise DataError("this trace could not be read: what TensorBoard has printed says why")
            raise StillReadingError(reading.progress)
        self._clear()
        return reading.trace

    def _clear(self) -> None:
        """Forgets those asked for longest ago until the rest takes no more than it may."""
        with self._lock:
            done = [key for key, reading in self._readings.items() if not reading.thread.is_alive()]
            held = sum(self._readings[key].size for key in done)
            for key in done[:-1]:
                if held <= MOST_MEMORY and len(self._readings) <= 100:
                    break
                held -= self._readings.pop(key).size


class Reading:
    """A trace being read by a thread of its own."""

    def __init__(self, path: Path, turn: threading.Lock) -> None:
        self.trace: Trace | None = None
        self.error = ""
        self.progress = 0.0
        self.thread = threading.Thread(target=self._read, args=(path, turn), daemon=True)
        self.thread.start()

    @property
    def size(self) -> int:
        return self.trace.size if self.trace else 0

    def _read(self, path: Path, turn: threading.Lock) -> None:
        from rlboard.profiler.traces import read_trace

        def report(progress: float) -> None:
            self.progress = progress

        with turn:
            try:
                self.trace = read_trace(path, report)
            except DataError as error:
                self.error = str(error)
            except MemoryError:
                self.error = "there is too little memory to read this trace: download it and open it in Perfetto"


def _answering(answer: Callable[[Request], Any]) -> WSGIApplication:
    """What `answer` returns as JSON, and what a user can mend as one line."""

    @Request.application
    def application(request: Request) -> Response:
        try:
            value, status = answer(request), 200
        except StillReadingError as reading:
            value, status = {"reading": reading.args[0]}, 202
        except DataError as error:
            value, status = {"error": str(error)}, 422
        except ValueError as error:
            value, status = {"error": f"a parameter cannot be used: {error}"}, 400
        except LookupError as error:
            value, status = {"error": str(error)}, 404
        except OSError as error:
            value, status = {"error": f"the trace cannot be read: {error.strerror}"}, 404
        response: Response = Respond(request, json.dumps(value), "application/json", code=status)
        return response

    return application


def _asset(path: Path) -> WSGIApplication:
    """A file of the page, read anew each time, so that it is that of the installed version."""

    @Request.application
    def application(request: Request) -> Response:
        response: Response = Respond(request, path.read_text("utf-8"), TYPES[path.suffix])
        return response

    return application


def _flag(text: str) -> bool:
    return text == "1"


def _time(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a time is not finite")
    return number


def _pixels(text: str) -> int:
    return min(max(int(text), 1), 10_000)
