"""Ask a server until it answers as expected: what the Pod of `helm test` runs. Standard library only."""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request

PAUSE_S = 1.0


def ask(url: str, key: str, model: str) -> str:
    """The answer to one chat; no model means the bare base."""
    body = {"messages": [{"role": "user", "content": "red apple"}], "temperature": 0, "max_tokens": 16}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body | ({"model": model} if model else {})).encode(),
        headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def main() -> int:
    """0: an answer that holds what is expected came in time."""
    url, expected = os.environ["SERVER_URL"], os.environ["EXPECT"]
    deadline = time.monotonic() + float(os.environ["TIMEOUT_S"])
    seen = "nothing"
    while time.monotonic() < deadline:
        try:
            seen = ask(url, os.environ["API_KEY"], os.environ["MODEL"])
        except urllib.error.HTTPError as error:
            seen = f"{error.code} {error.read()[:500].decode(errors='replace')}"
        except (OSError, ValueError, KeyError, IndexError) as error:
            seen = repr(error)
        else:
            if expected in seen:
                sys.stdout.write(f"{url} answered {seen!r}\n")
                return 0
        time.sleep(PAUSE_S)
    sys.stderr.write(f"{url} gave {seen}, not an answer with {expected!r}\n")
    return 1


sys.exit(main())
