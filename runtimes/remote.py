"""A runtime on another device: it sends token ids to the device and receives logits."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from llmc.errors import UserError
from llmc.runtimes.on_device import logits as there
from llmc.runtimes.targets.device import Device, ended


class RemoteRuntime:
    """A runtime (see base.py) in a process on a device. It first copies the artifact there. `close` also closes the device.

    The logits of the second half of a chunk of 512 tokens take vocabulary x 1 kB: 50 MB for 49152 tokens.
    """

    def __init__(self, device: Device, artifact: Path, context: int, threads: int | None, kind: str = "cpu",
                 kv: str | None = None) -> None:
        self._device, self._artifact = device, artifact
        try:
            self._open(context, threads, kind, kv)
        except BaseException:
            device.close()
            raise

    def _open(self, context: int, threads: int | None, kind: str, kv: str | None) -> None:
        device, artifact = self._device, self._artifact
        self._process = device.start(there.__name__, {"artifact": device.place(artifact), "context": context,
                                                      "threads": threads, "device": kind, "kv": kv})
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin.buffer, self._process.stdout.buffer  # type: ignore[attr-defined]
        opened = self._answer()[0]
        self.name: str = opened["name"]
        self.kv_type: str = opened["kv_type"]
        self.vocab_size: int = opened["vocab_size"]
        self.context: int = opened["context"]
        self._described = {**opened["runtime"], "target": {
            "name": device.target.name, "address": device.target.address, "emulated": device.emulated,
            "facts": {**device.target.facts, **opened["machine"]}}}

    def logits(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        return self._array("logits", ids=ids.tolist(), start=start)

    def prefill(self, ids: np.ndarray) -> np.ndarray:
        return self._array("prefill", ids=ids.tolist())

    def decode(self, token: int) -> np.ndarray:
        return self._array("decode", token=int(token))

    def tokenize(self, text: str, special: bool = True) -> np.ndarray:
        return np.array(self._ask("tokenize", text=text, special=special)[0]["ids"], np.int32)

    def detokenize(self, ids: list[int]) -> str:
        return str(self._ask("detokenize", ids=[int(i) for i in ids])[0]["text"])

    def chat(self, user: str) -> str:
        return str(self._ask("chat", user=user)[0]["text"])

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self._ask("end_tokens")[0]["ids"])

    def describe(self) -> dict[str, Any]:
        """The description by the runtime on the device, and `target`: the device."""
        return self._described

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._in.close()
        self._process.wait()
        self._out.close()
        self._device.close()

    def _array(self, what: str, **more: Any) -> np.ndarray:
        array = self._ask(what, **more)[1]
        assert array is not None, what
        return array

    def _ask(self, what: str, **more: Any) -> tuple[dict[str, Any], np.ndarray | None]:
        with suppress(BrokenPipeError):  # the process has ended: _answer raises the error
            self._in.write(json.dumps({"do": what, **more}).encode() + b"\n")
            self._in.flush()
        return self._answer()

    def _answer(self) -> tuple[dict[str, Any], np.ndarray | None]:
        line = self._out.readline()
        reply = json.loads(line) if line.endswith(b"\n") else {}
        if "problem" in reply:
            raise UserError(f"{self._device.target.name}: {reply['problem']}", reply["hint"])
        if not reply or "shape" not in reply:
            return (reply, None) if reply else self._dead()
        data = self._out.read(4 * int(np.prod(reply["shape"])))
        array = np.frombuffer(data[: len(data) // 4 * 4], "<f4")
        return (reply, array.reshape(reply["shape"])) if array.size == np.prod(reply["shape"]) else self._dead()

    def _dead(self) -> Any:
        raise ended(self._process, self._artifact, f" on {self._device.target.name}")
