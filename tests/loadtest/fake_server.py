"""An OpenAI-compatible server whose delays are known. Run as a process; the body of each request says what happens.

fake    {"ttft": s, "itl": s, "tokens": n, "status": 503, "cut_after": n, "comment": "…", …}; else the flags' values
GET /log    {"requests": [{"at", "headers", "body", "writes": [time of each token's write]}]}, time.monotonic()
--certificate             a PEM file: it speaks TLS
--stall-at, --stall-for   the whole process sleeps once, so long after its first request
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import time
from typing import Any

LOG: list[dict[str, Any]] = []


class Server:
    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags = flags
        self.has_stalled = flags.stall_for == 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                method, path, _ = lines[0].split(" ")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self.answer(method, path, headers, body, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(
        self, method: str, path: str, headers: dict[str, str], raw: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        if path == "/v1/models":
            return whole(writer, {"data": [{"id": "fake", "max_model_len": 4096}]})
        if path == "/log":
            return whole(writer, {"requests": LOG})
        if not LOG and not self.has_stalled:
            asyncio.get_running_loop().call_later(self.flags.stall_at, self.stall)
        body = json.loads(raw)
        asked = body.get("fake", {})
        seen: dict[str, Any] = {"at": time.monotonic(), "path": path, "headers": headers, "writes": []}
        seen["body"] = raw.decode() if self.flags.keep_bodies else ""
        LOG.append(seen)
        if "status" in asked:
            return whole(writer, {"error": {"message": "no", "code": "fake_error"}}, asked["status"])
        num_tokens = asked.get("tokens", body.get("max_tokens", 16))
        usage = {"prompt_tokens": self.count(body), "completion_tokens": num_tokens}
        is_chat = "chat" in path
        ttft, itl = asked.get("ttft", self.flags.ttft), asked.get("itl", self.flags.itl)
        start = time.monotonic()
        if not body.get("stream"):
            await asyncio.sleep(ttft + itl * (num_tokens - 1))
            text = "".join(f" {at}" for at in range(num_tokens))
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": self.logprobs(body, text)}
            choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
            return whole(writer, {"choices": [choice], "usage": usage})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n")
        writer.write(b"X-Request-Id: fake-%d\r\n\r\n" % len(LOG))
        if "comment" in asked:
            piece(writer, f": {asked['comment']}\n".encode())
        for at in range(num_tokens):
            await asyncio.sleep(max(start + ttft + at * itl - time.monotonic(), 0))
            if at == asked.get("cut_after"):
                if asked.get("is_clean"):
                    piece(writer, b"")
                return False
            choice = {"index": 0, "finish_reason": None, "logprobs": self.logprobs(body, f" {at}")}
            choice |= {"delta": {"content": f" {at}"}} if is_chat else {"text": f" {at}"}
            seen["writes"].append(time.monotonic())
            piece(writer, b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
        end = {"index": 0, "finish_reason": "length", **({"delta": {}} if is_chat else {"text": ""})}
        for event in ({"choices": [end]}, {"choices": [], "usage": usage, "system_fingerprint": "fp"}):
            piece(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
        piece(writer, b"data: [DONE]\n\n")
        piece(writer, b"")
        return True

    def logprobs(self, body: dict[str, Any], token: str) -> Any:
        if not body.get("logprobs"):
            return None
        drift = time.monotonic() if self.flags.drift else 0.0
        return {"tokens": [token], "token_logprobs": [-0.25 - drift]}

    @staticmethod
    def count(body: dict[str, Any]) -> int:
        """Ids are tokens, and so are words; every message costs 3 more."""
        if "messages" in body:
            return sum(3 + len(message["content"].split()) for message in body["messages"])
        prompt = body["prompt"]
        return len(prompt if isinstance(prompt, list) else prompt.split())

    def stall(self) -> None:
        if not self.has_stalled:
            self.has_stalled = True
            time.sleep(self.flags.stall_for)


def whole(writer: asyncio.StreamWriter, body: Any, status: int = 200) -> bool:
    data = json.dumps(body).encode()
    writer.write(
        f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    )
    writer.write(data)
    return True


def piece(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


async def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("ttft", "itl", "stall-at", "stall-for"):
        parser.add_argument(f"--{name}", type=float, default=0.0)
    parser.add_argument("--drift", action="store_true")
    parser.add_argument("--keep-bodies", action="store_true")
    parser.add_argument("--certificate", help="PEM of it and its key: speak TLS")
    flags = parser.parse_args()
    service = Server(flags)
    tls = None
    if flags.certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(flags.certificate)
    server = await asyncio.start_server(service.connected, "127.0.0.1", 0, backlog=1024, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
