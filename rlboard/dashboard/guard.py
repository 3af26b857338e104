"""Who may ask, and for what: TensorBoard alone answers everybody who reaches its port.

A page in the user's browser can be made to reach it under the name of its own server (DNS rebinding), so the host
that a request names must be ours. A dashboard that is exposed asks for a token too. And a run's projector
configuration, which names files to be sent to the browser, may name only those of the log directory.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
import socket
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from google.protobuf import text_format
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from werkzeug import Request, Response

from rlboard.config import printable

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

HOST = re.compile(r"(\[[^][@/]+\]|[^][:@/]+)(:\d+)?")
LOCAL = ("localhost", "127.0.0.1", "::1")
PROJECTOR_CONFIGS = ("projector_config.pbtxt", "plugins/org_tensorflow_tensorboard_projector/projector_config.pbtxt")
"""Where in a run TensorBoard looks for the configuration of its Projector."""


class Guard:
    """A WSGI application before TensorBoard's: refuses what is not allowed, and answers where TensorBoard fails.

    Args:
        app: TensorBoard's application.
        logdir: what TensorBoard reads, and `root` the log directory itself, in which every file it sends must lie.
        hosts: the names and addresses by which this server may be asked for, with any port.
        token: what a cookie, a bearer or the query `token` must hold; empty for nothing.
    """

    def __init__(
        self, app: WSGIApplication, *, logdir: Path, root: Path, hosts: Iterable[str], token: str = ""
    ) -> None:
        self.app, self.logdir, self.root, self.token = app, logdir, root, token
        self.hosts = {_plain(host) for host in hosts}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ)
        if refusal := self._refusal(request):
            return refusal(environ, start_response)
        try:
            return self.app(environ, start_response)
        except Exception as error:  # noqa: BLE001 - a run whose files TensorBoard fails on ends no dashboard
            problem = f"TensorBoard cannot answer {printable(request.path)}: {type(error).__name__}"
            warnings.warn(f"{problem}: {printable(error, 200)}", stacklevel=1)
            return Response(f"{problem}\n", 500)(environ, start_response)

    def _refusal(self, request: Request) -> Response | None:
        host = HOST.fullmatch(request.headers.get("Host", ""))
        if not host or _plain(host[1]) not in self.hosts:
            return Response("This dashboard is not known by that name: see rlboard dashboard --allowed-host\n", 403)
        if self.token:
            cookie = f"rlboard-token-{request.environ['SERVER_PORT']}"
            if self._is_token(request.args.get("token")):
                rest = [(name, value) for name, value in request.args.items(multi=True) if name != "token"]
                answer = Response(status=303, headers={"Location": f"/?{urlencode(rest)}" if rest else "/"})
                # Lax: a link on another site may lead here, but no form or script of it acts in the user's name.
                answer.set_cookie(cookie, self.token, httponly=True, samesite="Lax")
                return answer
            bearer = request.authorization.token if request.authorization else None
            if not self._is_token(bearer) and not self._is_token(request.cookies.get(cookie)):
                text = "This dashboard asks for a token: open the address that rlboard dashboard has printed\n"
                return Response(text, 401, {"WWW-Authenticate": "Bearer"})
        # In the path's middle, because TensorBoard takes prefixes such as /experiment/NAME off.
        if "/plugin/projector/" in request.path:
            for run in request.args.getlist("run"):
                if found := outside(self.logdir / run, self.root):
                    return Response(f"{found}\n", 403)
        return None

    def _is_token(self, given: str | None) -> bool:
        return given is not None and secrets.compare_digest(given.encode(), self.token.encode())


def outside(directory: Path, root: Path) -> str:
    """Says which file a run's projector configuration names that lies neither in the run nor below `root`, if any."""
    for config_path in (directory / name for name in PROJECTOR_CONFIGS):
        config = ProjectorConfig()
        try:
            text_format.Parse(config_path.read_text("utf-8"), config)
        except (OSError, ValueError, text_format.ParseError):
            continue  # what cannot be read here, TensorBoard cannot read either
        beside = config_path.parent
        for name in _named_files(config):
            if not _is_below(beside / os.path.expanduser(name), beside, root):  # noqa: PTH111 - as TensorBoard does
                where = f"{printable(config_path, 200)} names {printable(name, 200)}"
                return f"{where}, which is outside the log directory: delete that line or the file"
    return ""


def _is_below(path: Path, *places: Path) -> bool:
    """Whether `path` lies in one of `places` when all links are followed."""
    try:
        return any(path.resolve().is_relative_to(place.resolve()) for place in places)
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name that no file can have
        return False


def _named_files(config: ProjectorConfig) -> Iterable[str]:
    names = [config.model_checkpoint_path]
    for embedding in config.embeddings:
        names += (embedding.tensor_path, embedding.metadata_path, embedding.bookmarks_path, embedding.sprite.image_path)
    return filter(None, names)


def is_loopback(host: str) -> bool:
    """Whether only this machine itself reaches a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_every_address(host: str) -> bool:
    """Whether a server that listens at `host` is reached at every address of this machine."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def machine_names() -> list[str]:
    """The names and addresses of this machine, the one that others most likely reach it by first."""
    names = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it asks which address would be sent from
        names.append(probe.getsockname()[0])
    names += [socket.gethostname(), socket.getfqdn()]
    with contextlib.suppress(OSError):
        names += [str(address[0]) for *_, address in socket.getaddrinfo(socket.gethostname(), None)]
    return list(dict.fromkeys(names))


def allowed_hosts(host: str, more: Collection[str], *, exposed: bool) -> set[str]:
    """What a request's Host header may name."""
    return {*LOCAL, host, *more, *(machine_names() if exposed else ())}


def _plain(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()
