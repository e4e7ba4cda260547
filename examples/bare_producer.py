"""A producer that knows nothing of Headrace but its wire: the `redis` and `msgpack` packages are all it needs.

    python examples/bare_producer.py --redis-url unix://$HOME/.local/state/headrace/data/redis.sock 'def add(a, b):'

It pushes one job, prints the tokens as they are committed, then the terminal entry, and last reads the whole answer
again from the journal. The journal is the truth; what is published live only saves reading it. So a publication that
does not fit at our cursor, or a second of silence, sends us to the journal, and nothing is ever lost or seen twice.
"""

import argparse
import secrets

import msgpack
import redis

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt")
parser.add_argument("--redis-url", default="redis://127.0.0.1:6379/0")
parser.add_argument("--model", help="the served model name (default: the first one that is served)")
parser.add_argument("--max-tokens", type=int, default=64)


def read_frames(raw: bytes) -> list:
    """Frames stand end to end: [token id, text, finish reason or nil, extra or nil]."""
    unpacker = msgpack.Unpacker(strict_map_key=False)
    unpacker.feed(raw)
    return list(unpacker)


def main() -> None:
    args = parser.parse_args()
    server = redis.Redis.from_url(args.redis_url, socket_timeout=None)
    model = args.model or sorted(server.hkeys("headrace:models"))[0].decode()
    prefix = f"headrace:{{{model}}}:"
    name = f"producer-{secrets.token_hex(8)}"  # of our reply channel and results stream

    live = server.pubsub(ignore_subscribe_messages=False)
    live.subscribe(f"{prefix}out:{name}")
    live.get_message(timeout=10)  # the acknowledgement: from here on nothing published is missed

    job = {
        "v": 1,
        "id": f"example-{secrets.token_hex(8)}",  # the same id again would be the same request, not a second run
        "prompt": args.prompt,
        "sampling": {"max_tokens": args.max_tokens, "temperature": 0.7},
        "reply_to": name,
        "results": name,
    }
    server.xadd(f"{prefix}jobs", {"job": msgpack.packb(job)})  # durable from here on

    rid, cursor, finish = None, 0, None
    while finish is None:
        message = live.get_message(timeout=1.0)
        pieces = []
        if message is not None and message["type"] == "message":
            rows = msgpack.Unpacker()
            rows.feed(message["data"])
            for row_rid, choice, at, frames, _id in rows:
                rid = row_rid or rid
                if choice == 0 and at == cursor:  # -1 is the notice that the job was admitted
                    pieces.append(frames)
                    cursor += len(frames)
        if not pieces:
            rid = rid or find(server, prefix, job["id"])
            missed = server.getrange(f"{prefix}j:{rid}:0", cursor, -1) if rid else b""
            pieces.append(missed)
            cursor += len(missed)
            if not missed and server.exists(f"{prefix}results:{name}"):
                break  # it ended, and we have read all; or it was refused and has no journal
        for _token, text, reason, _extra in read_frames(b"".join(pieces)):
            print(text, end="", flush=True)
            finish = reason or finish
    print()

    ((_, entries),) = server.xread({f"{prefix}results:{name}": "0"}, block=10_000)
    (_, fields), *_ = entries
    print("result:", msgpack.unpackb(fields[b"result"]))

    journal = server.get(f"{prefix}j:{rid}:0") or b""
    frames = read_frames(journal)
    print(f"journal: {len(journal)} bytes, {len(frames)} frames, text", repr("".join(f[1] for f in frames)))


def find(server: redis.Redis, prefix: str, job_id: str) -> str | None:
    """The request id that the server gave to our job; None until it has been read, or if it was refused."""
    rid = (server.get(f"{prefix}idem:default:{job_id}") or b"-").split()[0].decode()
    return None if rid == "-" else rid


if __name__ == "__main__":
    main()
