"""Two services, a sidecar in front of each, and real traffic through both hops:

you -> 18000 [shop's sidecar] -> shop -> 18001 [shop's sidecar] -> 18100 [orders' sidecar] -> orders

python run.py                  do it, say what happened, end
python run.py --keep           stay up until Ctrl-C, to play with
python run.py --proxy envoy    the same with the real Envoy: the configuration is the same file
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHOP, SHOP_ADMIN, ORDERS_ADMIN = "http://127.0.0.1:18000", "http://127.0.0.1:18009", "http://127.0.0.1:18109"
PORTS = (18000, 18001, 18009, 18080, 18100, 18109, 18180)
REQUESTS = 12


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: object) -> None:
        return None


opener = urllib.request.build_opener(_NoRedirect)


def get(url: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body, whatever the status."""
    try:
        with opener.open(url, timeout=10) as response:
            return response.status, dict(response.headers.items()), response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers.items()), error.read().decode()


def wait_until(what: str, condition: Callable[[], bool], seconds: float = 15) -> None:
    """Wait for the condition, asking every 20 ms."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.02)
    sys.exit(f"{what} did not come up within {seconds:.0f} s")


def listening(port: int) -> bool:
    """Whether somebody takes connections on that port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def stats(admin: str, pattern: str) -> dict[str, int]:
    """Counters and gauges whose names match, from a sidecar's admin endpoint."""
    _, _, body = get(f"{admin}/stats?format=json&filter={pattern}")
    return {stat["name"]: stat["value"] for stat in json.loads(body)["stats"] if "value" in stat}


def start(proxy: str) -> list[subprocess.Popen]:
    """Both services, then both sidecars; returns when all are ready."""
    taken = [port for port in PORTS if listening(port)]
    if taken:
        sys.exit(f"the demo needs the ports {PORTS} of 127.0.0.1; taken: {taken}")
    services = str(HERE / "services.py")
    sidecar = [sys.executable, "-m", "meshproxy"] if proxy == "meshproxy" else [proxy, "--disable-hot-restart"]
    flags = ("--concurrency", "1", "-l", "error", "--file-flush-interval-msec", "1000")
    commands = (
        [sys.executable, services, "orders", "18180"],
        [sys.executable, services, "shop", "18080", "http://127.0.0.1:18001"],
        [*sidecar, "-c", str(HERE / "orders.yaml"), *flags],
        [*sidecar, "-c", str(HERE / "shop.yaml"), *flags],
    )
    processes = [subprocess.Popen(command, cwd=HERE.parent.parent) for command in commands]
    try:
        wait_until("the services", lambda: listening(18180) and listening(18080))
        started = time.monotonic()
        for name, admin in (("orders' sidecar", ORDERS_ADMIN), ("shop's sidecar", SHOP_ADMIN)):
            wait_until(name, lambda admin=admin: get(f"{admin}/ready")[0] == 200)
        print(f"two services and two sidecars are up ({time.monotonic() - started:.2f} s for the sidecars)")
    except BaseException:
        stop(processes)
        raise
    return processes


def stop(processes: list[subprocess.Popen]) -> None:
    """Ask, in order; then insist."""
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def drive() -> bool:
    """Send traffic, say what happened; whether all of it was as expected."""
    print(f"\n{REQUESTS} customers look at their orders. The orders service fails every third call; its caller's sidecar tries again:\n")
    outcomes = [get(f"{SHOP}/customer/{number}") for number in range(REQUESTS)]
    good = sum(status == 200 for status, _, _ in outcomes)
    time.sleep(1.2)  # access logs are written once a second

    print("\nOther routes of the same sidecar:\n")
    health = get(f"{SHOP}/healthz")
    moved = get(f"{SHOP}/old/customer/7")
    denied = get(f"{SHOP}/admin/keys")
    time.sleep(1.2)
    print(f"\n  /healthz         {health[0]}  answered by the sidecar itself: {health[2]!r}")
    print(f"  /old/customer/7  {moved[0]}  location: {moved[1].get('location')}")
    print(f"  /admin/keys      {denied[0]}  {denied[2]}")

    to_orders = stats(SHOP_ADMIN, "^cluster.orders.upstream_(rq|cx)_")
    at_orders = stats(ORDERS_ADMIN, "^cluster.orders.upstream_rq_|^http.inbound.downstream_rq_")
    print("\nWhat shop's sidecar counted for the cluster `orders`:\n")
    for name in ("upstream_rq_total", "upstream_rq_retry", "upstream_rq_retry_success", "upstream_rq_200", "upstream_rq_503", "upstream_cx_total"):
        print(f"  {name:28} {to_orders.get(f'cluster.orders.{name}', 0):6}")
    retries = to_orders.get("cluster.orders.upstream_rq_retry", 0)
    reached = at_orders.get("http.inbound.downstream_rq_total", 0)
    print(f"\n{good} of {REQUESTS} customers got their orders; {retries} failures were hidden by a retry; {reached} requests reached orders' sidecar.")
    return good == REQUESTS and retries > 0 and reached == REQUESTS + retries and (health[0], moved[0], denied[0]) == (200, 301, 403)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="stay up until Ctrl-C")
    parser.add_argument("--proxy", default="meshproxy", help="the sidecar to use: meshproxy (default), or the path of an Envoy binary")
    arguments = parser.parse_args()
    processes = start(arguments.proxy)
    try:
        fine = drive()
        if arguments.keep:
            print(f"\nStaying up. Try: curl -i {SHOP}/customer/1; curl {SHOP_ADMIN}/clusters; curl '{SHOP_ADMIN}/stats?usedonly'\nCtrl-C ends it.")
            try:
                while all(process.poll() is None for process in processes):
                    time.sleep(0.5)
            except KeyboardInterrupt:
                print()
    finally:
        stop(processes)
    print("\nAll ended." if fine else "\nAll ended, but something was not as expected: see above.")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
