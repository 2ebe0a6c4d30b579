"""A real vLLM server for the tests that can use one; where its Python is, DIFFING_VLLM_PYTHON says (deploy/vllm.md)."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PYTHON = os.environ.get("DIFFING_VLLM_PYTHON")
READY_S = 300
_SWITCHES = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def vllm_running(base: Path, log: Path) -> Iterator[str]:
    """The URL of a server of the checkpoint in `base`, under the name `base`, that loads adapters when asked to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"model": base, "served-model-name": "base", "max-lora-rank": 8, "max-loras": 2, "max-model-len": 256}
    options |= {"dtype": "float32", "host": "127.0.0.1", "port": port}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--enable-lora", "--enforce-eager", *flags]
    with log.open("w") as out:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        server = subprocess.Popen(command, stdout=out, stderr=out, env=clean | _SWITCHES, cwd=log.parent)
        try:
            _wait(server, f"http://127.0.0.1:{port}/v1", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def _wait(server: subprocess.Popen, url: str, log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < READY_S:
        try:
            urllib.request.urlopen(f"{url}/models", timeout=5).close()
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(1)
        else:
            return
    raise AssertionError(f"no answer in {READY_S} s: {log.read_text()[-2000:]}")
