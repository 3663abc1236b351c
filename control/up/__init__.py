"""A mesh on one machine, `meshctl up`: the control plane, its authority, the processes that Workload documents describe, and a sidecar for each of them."""
