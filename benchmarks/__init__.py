"""How fast, how big and how soon ready: meshproxy beside the real Envoy, nginx and HAProxy, in turn, on the same machine.

`python -m benchmarks` runs every scenario and writes RESULTS.md; docs/benchmarks.md says what is measured, how, and why so. Start reading at
`scenarios.py` (what is measured, as data); `runner.py` runs it; `proxies.py`, `backend.py`, `load.py` and `measure.py` are its hands; `report.py` and
`plots.py` show the outcome. `sender.py` and `tcp_load.py` are load generators, processes of their own.
"""
