"""What the chart renders, as processes of this machine: the environment, arguments and commands of its containers.

No images and no cluster: only addresses, ports and the two folders of a container are replaced.
"""

from __future__ import annotations

import base64
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.chart.checks import Object, Rendered, quantity

START_TIMEOUT_S = 120.0
PAUSE_S = 0.1


@dataclass
class Machine:
    """One rendering, and where its Services are found here."""

    rendered: Rendered
    folder: Path
    ports: Mapping[str, int]  # Service name -> port on this machine

    def localised(self, text: str, room: Path) -> str:
        for service, port in self.ports.items():
            found = self.rendered.find("Service", service)
            assert found is not None
            text = text.replace(f"http://{service}:{found['spec']['ports'][0]['port']}", f"http://127.0.0.1:{port}")
        return text.replace("/var/lib/multigraft", str(room / "data")).replace("/tmp", str(room / "tmp"))

    def environment(self, container: Object, room: Path) -> dict[str, str]:
        """As the kubelet would put it together: ConfigMaps first, then values, Secrets and resource fields."""
        found: dict[str, str] = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
        for source in container.get("envFrom", ()):
            config = self.rendered.find("ConfigMap", source["configMapRef"]["name"])
            assert config is not None
            found |= config["data"]
        for item in container.get("env", ()):
            source = item.get("valueFrom", {})
            if "secretKeyRef" in source:
                secret = self.rendered.find("Secret", source["secretKeyRef"]["name"])
                assert secret is not None
                found[item["name"]] = base64.b64decode(secret["data"][source["secretKeyRef"]["key"]]).decode()
            elif "resourceFieldRef" in source:
                kind, _, name = source["resourceFieldRef"]["resource"].partition(".")
                found[item["name"]] = str(math.ceil(quantity(container["resources"][kind][name]) or 0))
            else:
                found[item["name"]] = item["value"]
        room.joinpath("tmp").mkdir(parents=True, exist_ok=True)
        room.joinpath("data").mkdir(exist_ok=True)
        return {name: value if name == "PATH" else self.localised(value, room) for name, value in found.items()}

    @contextmanager
    def deployment(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """A Deployment's one container, once its startup probe has answered; killed at the end if it still runs."""
        found = self.rendered.find("Deployment", name)
        assert found is not None
        [container] = found["spec"]["template"]["spec"]["containers"]
        room = self.folder / name
        arguments = [*container["args"]]
        arguments[arguments.index("--host") + 1] = "127.0.0.1"
        arguments[arguments.index("--port") + 1] = str(self.ports[name])
        environment = self.environment(container, room)
        log = room / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(["hub", *arguments], env=environment, cwd=room, stdout=out, stderr=out)
        try:
            probe, deadline = container["startupProbe"]["httpGet"]["path"], time.monotonic() + START_TIMEOUT_S
            while status(f"http://127.0.0.1:{self.ports[name]}{probe}") != 200:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(PAUSE_S)
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()

    def pod(self, name: str) -> subprocess.CompletedProcess[str]:
        """A Pod of `helm test`, run to its end within its own deadline."""
        found = self.rendered.find("Pod", name)
        assert found is not None
        [container] = found["spec"]["containers"]
        room = self.folder / name
        shutil.rmtree(room, ignore_errors=True)  # its /tmp is an emptyDir
        environment = self.environment(container, room)
        command: Sequence[str] = [self.localised(word, room) for word in container["command"]]
        limit = found["spec"]["activeDeadlineSeconds"]
        return subprocess.run(
            command, env=environment, cwd=room, capture_output=True, text=True, timeout=limit, check=False
        )


def status(url: str) -> int | None:
    """The HTTP status; None when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(found.getsockname()[1]) for found in sockets]
    for found in sockets:
        found.close()
    return ports
