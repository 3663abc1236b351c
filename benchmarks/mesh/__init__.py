"""What the control plane costs, and what traffic feels of it: many proxies, updates under load, edits, certificates that change, a control plane that is away.

`documents.py` makes the folders; `plane.py` starts `meshctl` over them; `clients.py` (a process) is many light xDS clients at once; `traffic.py` (a process)
is steady requests, of which every one is counted. Each of `scale`, `updates`, `edit` and `faultless` is a measurement; `runner` starts them.
"""

BOTH_OURS, TO_ENVOY, FROM_ENVOY = "both ours", "ours to envoy", "envoy to ours"  # pairs of sidecars, the client's first
QUIET, ENDPOINTS_CHANGE, CLUSTERS_CHANGE = "quiet", "endpoints change", "clusters change"
EDITS, UP = "an edit", "meshctl up"
