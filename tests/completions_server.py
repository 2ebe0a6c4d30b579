"""A completions server for tests: the part of vLLM's protocol that `generate` uses, over transformers and PEFT.

It runs in a thread of the test. `faults` are HTTP statuses to answer first; `tamper` changes an answer before it goes.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

Body = dict[str, Any]


@dataclass
class CompletionsServer:
    """One base model under the name `base`, and adapters that were loaded into it."""

    folder: Path
    loads_adapters: bool = True
    faults: list[int] = field(default_factory=list)
    tamper: Callable[[Body], object] = lambda answer: answer
    requests: list[Body] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self._model: Any = tf.AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self._adapters: list[str] = []
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator["CompletionsServer"]:
        """Answers on a free port of this machine."""
        routes = [
            Route("/v1/models", self._list),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/load_lora_adapter", self._load, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="warning")
        server = uvicorn.Server(config)
        socket = config.bind_socket()
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}/v1"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join()

    async def _list(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self._names()]})

    async def _load(self, request: Request) -> Response:
        body = await request.json()
        if not self.loads_adapters:
            return _refused(404, "Not Found")
        if not Path(body["lora_path"]).is_dir():
            return _refused(404, f"No adapter found for {body['lora_path']}")
        name = body["lora_name"]
        if self._adapters:
            self._model.load_adapter(body["lora_path"], name)
        else:
            self._model = peft.PeftModel.from_pretrained(self._model, body["lora_path"], name)
        self._model.eval()
        self._adapters.append(name)
        return PlainTextResponse("Success")

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.requests.append(body)
        if self.faults:
            return _refused(self.faults.pop(0), "out of order")
        if body["model"] not in self._names():
            return _refused(404, f"The model {body['model']} does not exist.")
        with self._lock, torch.no_grad():
            answer = self.tamper(self._answer(body))
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    def _names(self) -> list[str]:
        return ["base", *self._adapters]

    def _answer(self, body: Body) -> Body:
        generator = torch.Generator().manual_seed(body["seed"])
        ids, logprobs = list(body["prompt"]), []
        if body["model"] != "base":
            self._model.set_adapter(body["model"])
        with self._model.disable_adapter() if self._adapters and body["model"] == "base" else nullcontext():
            while len(logprobs) < body["max_tokens"]:
                raw_V = self._model(input_ids=torch.tensor([ids])).logits[0, -1].float()
                ids.append(_draw(raw_V, body, generator))
                logprobs.append(raw_V.log_softmax(-1)[ids[-1]].item())
                if ids[-1] in body["stop_token_ids"]:
                    break
        said = {"token_ids": ids[len(body["prompt"]) :], "prompt_token_ids": body["prompt"], "text": "not used"}
        return {"choices": [said | {"index": 0, "logprobs": {"token_logprobs": logprobs}}]}


def _draw(raw_V: torch.Tensor, body: Body, generator: torch.Generator) -> int:
    if body["temperature"] == 0:
        return int(raw_V.argmax())
    sorted_V, order_V = (raw_V / body["temperature"]).softmax(-1).sort(descending=True)
    kept_V = sorted_V.where(sorted_V.cumsum(-1) - sorted_V < body["top_p"], 0.0)
    return int(order_V[torch.multinomial(kept_V, 1, generator=generator)])


def _refused(status: int, why: str) -> Response:
    return JSONResponse({"error": {"message": why, "code": status}}, status)
