"""Upstreams: clusters, their hosts, how one is chosen, and the connections to it. Imports api, codec, observe and net.

Start with `cluster_manager` (clusters by name, compiled when first used) and `cluster`. `balance` chooses hosts, `pool` keeps connections, `limits` breaks
circuits, `outlier` judges by real requests; `discovery` and `health` run in main and tell workers what they find. `status` is what /clusters shows.
"""
