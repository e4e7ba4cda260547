"""The Secrets that the manifests name, with new random passwords, as a list for ``kubectl apply -f -``.

    python deploy/kubernetes/make_secrets.py [URL of the server, without user]

Each role gets its own URL, the server the users of ``../users.acl`` (by hashes), the gateways the hash of one API key,
which is shown once, on stderr. Running it again replaces all passwords and the key.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ACL = Path(__file__).parents[1] / "users.acl"
NAMESPACE = "headrace"
ROLES = ("gateway", "scheduler", "worker", "producer")


def secret(name: str, files: dict[str, str]) -> dict[str, Any]:
    metadata = {"name": name, "namespace": NAMESPACE}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": files}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def all_secrets(url: str, api_key: str) -> list[dict[str, Any]]:
    """One Secret for each role, one for the server, one for the API keys. ``url``: redis://host:port/db or the like."""
    scheme, _, rest = url.partition("://")
    if not rest or urlsplit(url).username is not None:
        raise SystemExit(f"{url!r}: give a URL without user and password, as redis://host:6379/0")
    users, found = ACL.read_text(), []
    for role in ROLES:
        password = secrets.token_urlsafe(32)
        users = users.replace(f">CHANGE-ME-{role} ", f"#{sha256(password)} ")
        found.append(secret(f"headrace-redis-{role}", {"url": f"{scheme}://{role}:{password}@{rest}"}))
    keys = [{"sha256": sha256(api_key), "tenant": "default"}]
    return [
        *found,
        secret("headrace-valkey", {"users.acl": users}),
        secret("headrace-api-keys", {"api-keys.json": json.dumps(keys)}),
    ]


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "redis://headrace-valkey:6379/0"
    api_key = "hr-" + secrets.token_urlsafe(32)
    print(json.dumps({"apiVersion": "v1", "kind": "List", "items": all_secrets(url, api_key)}, indent=2))
    print(f"API key of the tenant 'default': {api_key}", file=sys.stderr)


if __name__ == "__main__":
    main()
