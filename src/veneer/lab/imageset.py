"""The images of the lab: a HelloBench set from distribution packages, and when each counts as started.

An image says what it is made of, what runs in it, and how it is known to be ready: a program by its output
and its end, a server by an answer of its protocol. Never by a line in a log, which comes when a buffer is
flushed, nor by an open port, which comes before anybody can answer.

The definitions are for one release of Debian; paths such as PostgreSQL's have its versions in them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from veneer.errors import UsageError

__all__ = ["IMAGES", "RECIPE", "SUITE", "SYNTHETIC_FILE", "ImageSpec", "Probe", "find_images"]

SUITE = "bookworm"
#: Of how images are made of definitions; another number makes all of them anew.
RECIPE = 3
SYNTHETIC_FILE = 4 << 20

#: Below the range from which the kernel takes ports of its own accord, above the well-known ones.
_REDIS, _POSTGRES, _NODE, _NGINX = 20_379, 20_432, 20_080, 20_081
_PGDATA = "/var/lib/postgresql/lab"
_PGBIN = "/usr/lib/postgresql/15/bin"


@dataclass(frozen=True, slots=True)
class Probe:
    """When a start counts.

    Args:
        kind: ``exit``: it ends with status 0, and its output begins with ``answer``;
            ``http``: GET of ``path`` is answered with status 200 and a body that has ``answer`` in it;
            ``redis``: PING is answered by PONG; ``postgres``: a query is answered.
        answer: what it says.
        port: of a server, on the loopback of the host's network.
        path: for ``http``.
    """

    kind: str
    answer: str = ""
    port: int = 0
    path: str = "/"

    @property
    def is_server(self) -> bool:
        """Whether it runs on after it is ready."""
        return self.kind != "exit"


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How one image is made, and run.

    Args:
        name: of the image.
        about: what it stands for.
        packages: on top of the base layer, as the runtime layer; none makes no such layer.
        command: what runs.
        probe: when it counts as started.
        files: of the app layer, by path without a leading slash.
        user: whom it runs as.
        env: in addition to a path and a locale.
        removed: paths of the runtime that differ from build to build, or would be made anew in a container.
        synthetic: how many files of :data:`SYNTHETIC_FILE` bytes are made up for the app layer, from
            ``/data/00`` on.
        large: measured fewer times.
    """

    name: str
    about: str
    packages: tuple[str, ...]
    command: tuple[str, ...]
    probe: Probe
    files: Mapping[str, bytes] = field(default_factory=dict)
    user: str = ""
    env: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    synthetic: int = 0
    large: bool = False


_NODE_SERVER = f"""\
const http = require('http');
const crypto = require('crypto');
const server = http.createServer((request, response) => {{
  response.setHeader('ETag', crypto.createHash('sha256').update(request.url).digest('hex'));
  response.end('hello from ' + process.version + '\\n');
}});
server.listen({_NODE}, '127.0.0.1');
for (const name of ['SIGTERM', 'SIGINT']) process.on(name, () => process.exit(0));
""".encode()

_NGINX_CONFIG = f"""\
daemon off;
worker_processes 1;
pid /run/nginx.pid;
error_log stderr;
events {{ worker_connections 64; }}
http {{
  include /etc/nginx/mime.types;
  access_log off;
  server {{
    listen 127.0.0.1:{_NGINX};
    root /app/www;
  }}
}}
""".encode()

_C_PROGRAM = b"""\
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int main(void) {
    puts("hello from C");
    return EXIT_SUCCESS;
}
"""

_INITDB = f"{_PGBIN}/initdb -D {_PGDATA} -A trust -N --no-instructions >/dev/null"
_POSTGRES_OPTIONS = f"-p {_POSTGRES} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"

_PYTHON = "import json,ssl,urllib.request,email; print(1)"
_SCIENCE = "import pandas, scipy.stats, sklearn.linear_model; print(1)"

IMAGES: Mapping[str, ImageSpec] = {
    image.name: image
    for image in (
        ImageSpec(
            "base",
            "a distribution's base and a shell",
            (),
            ("bash", "-c", "echo hello"),
            Probe("exit", "hello"),
        ),
        ImageSpec(
            "python",
            "an interpreter with a large library",
            ("python3", "ca-certificates"),
            ("python3", "-c", _PYTHON),
            Probe("exit", "1"),
        ),
        ImageSpec(
            "python-sci",
            "some thousand modules and shared libraries",
            (
                "python3",
                "ca-certificates",
                "python3-numpy",
                "python3-scipy",
                "python3-pandas",
                "python3-sklearn",
            ),
            ("python3", "-c", _SCIENCE),
            Probe("exit", "1"),
            env=("OPENBLAS_NUM_THREADS=1",),
            large=True,
        ),
        ImageSpec(
            "node",
            "a just-in-time compiler that serves HTTP",
            ("nodejs",),
            ("node", "/app/server.js"),
            Probe("http", "hello from v", _NODE),
            {"app/server.js": _NODE_SERVER},
        ),
        ImageSpec(
            "nginx",
            "a small server that serves a file by HTTP",
            ("nginx-light",),
            ("nginx", "-c", "/app/nginx.conf"),
            Probe("http", "hello from nginx", _NGINX),
            {"app/nginx.conf": _NGINX_CONFIG, "app/www/index.html": b"hello from nginx\n"},
        ),
        ImageSpec(
            "redis",
            "a small server of its own protocol",
            ("redis-server",),
            ("redis-server", "--bind", "127.0.0.1", "--port", str(_REDIS), "--save", "", "--appendonly", "no"),
            Probe("redis", port=_REDIS),
        ),
        ImageSpec(
            "postgres",
            "a server that first makes its files, as an ordinary user",
            ("postgresql-15",),
            ("sh", "-c", f"{_INITDB} && exec {_PGBIN}/postgres -D {_PGDATA} {_POSTGRES_OPTIONS}"),
            Probe("postgres", port=_POSTGRES),
            user="postgres",
            # The cluster has an identity of its own and the certificate a key: no two builds have the same.
            removed=(
                "var/lib/postgresql/15",
                "etc/postgresql/15",
                "etc/ssl/private/ssl-cert-snakeoil.key",
                "etc/ssl/certs/ssl-cert-snakeoil.pem",
            ),
        ),
        ImageSpec(
            "openjdk",
            "a virtual machine in one large file",
            ("openjdk-17-jre-headless",),
            ("java", "--version"),
            Probe("exit", "openjdk 17"),
            # The key store has the time at which each certificate was imported.
            removed=("etc/ssl/certs/java/cacerts",),
        ),
        ImageSpec(
            "gcc",
            "a compiler: several programs, headers and archives",
            ("gcc", "libc6-dev"),
            ("sh", "-c", "gcc -O2 -o /tmp/hello /app/hello.c && /tmp/hello"),
            Probe("exit", "hello from C"),
            {"app/hello.c": _C_PROGRAM},
        ),
        ImageSpec(
            "synthetic",
            "a large data set of which a start reads a sixteenth",
            (),
            ("sh", "-c", "cat /data/?0 | wc -c"),
            Probe("exit", str(8 * SYNTHETIC_FILE)),
            synthetic=128,
            large=True,
        ),
    )
}


def find_images(names: tuple[str, ...]) -> tuple[ImageSpec, ...]:
    """The images of those names; all when there are none. Raises UsageError."""
    unknown = [name for name in names if name not in IMAGES]
    if unknown:
        raise UsageError(f"no such image: {unknown[0]}", hint=f"one of {', '.join(IMAGES)}")
    return tuple(IMAGES[name] for name in names) if names else tuple(IMAGES.values())
