"""The mesh of this folder, end to end: `meshctl up`, requests through it, an edit while it runs, who may not, and `meshctl down`.

you -> front -> orders -> prices v1 or v2; a sidecar in front of each, mutual TLS between all of them

python run.py     do it with a copy of the folder, say what happened, end
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MESHCTL = (sys.executable, "-m", "control")
# Of the copy: once everybody gets v1, and then everybody gets v2.
WEIGHTS = (("subset: v1}, weight: 100", "subset: v1}, weight: 0"), ("subset: v2}, weight: 0", "subset: v2}, weight: 100"))
PATIENCE_S = 15


def meshctl(*arguments: str) -> str:
    """What it prints; raises CalledProcessError if it fails, with its reasons already on stderr."""
    return subprocess.run([*MESHCTL, *arguments], check=True, stdout=subprocess.PIPE, text=True, cwd=HERE.parent.parent).stdout


def get(url: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """The answer of a service, which says who it is and what the next one said."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=10) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def last(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of the service at the end of the chain."""
    while "asked" in answer:
        answer = answer["asked"]
    return answer


def callers(answer: dict[str, Any]) -> list[str]:
    """The identities that each service on the way saw in its caller's certificate."""
    seen = [part.removeprefix("URI=") for part in answer["called_by"].split(";") if part.startswith("URI=")]
    return seen + (callers(answer["asked"]) if "asked" in answer else [])


def drive(folder: Path, reached_at: dict[str, str]) -> bool:
    """Send traffic, say what happened; whether all of it was as expected. `reached_at`: host and port of each workload's sidecar."""
    front = f"http://{reached_at['front']}/"
    answer = get(front)
    ann = get(front, {"x-user": "ann"})
    print(f"you get prices {last(answer)['version']}, ann gets {last(ann)['version']}: a header decides, two hops further on")
    who = callers(answer)
    print(f"each hop is mutual TLS, and knows who calls: {', '.join(who)}")

    prices = folder / "prices.yaml"
    text = prices.read_text()
    for before, after in WEIGHTS:
        text = text.replace(before, after)
    prices.write_text(text)
    edited = time.monotonic()
    while last(get(front))["version"] != "v2" and time.monotonic() < edited + PATIENCE_S:
        time.sleep(0.01)
    moved = last(get(front))["version"]
    print(f"the weights in prices.yaml were edited: you get prices {moved}, {1000 * (time.monotonic() - edited):.0f} ms later")

    refused = 0
    request = urllib.request.Request(f"http://{reached_at['prices-v1']}/")
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        print(f"prices, asked without a certificate: {error.code}")
    except OSError as error:
        refused = 1
        print(f"prices, asked without a certificate, says nothing at all: {error}")
    print("\n" + meshctl("proxy-status", "--folder", str(folder)))
    identities = [f"spiffe://cluster.local/ns/default/sa/{name}" for name in ("front", "orders")]
    return (last(answer)["version"], last(ann)["version"], moved, who, refused) == ("v1", "v2", "v2", identities, 1)


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "mesh"
        shutil.copytree(HERE, folder)
        print("four services, a sidecar each, a control plane and an authority:\n")
        try:
            print(meshctl("up", str(folder), "--detach"))
            running = json.loads((folder.with_suffix(".state") / "up.json").read_text())["workloads"]
            fine = drive(folder, {workload["name"]: workload["inbound"]["http"] for workload in running})
        finally:
            subprocess.run([*MESHCTL, "down", str(folder)], check=False, cwd=HERE.parent.parent)
    print("All ended." if fine else "All ended, but something was not as expected: see above.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
