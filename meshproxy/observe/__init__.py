"""What the proxy tells about itself: statistics, access logs, format strings, response flags.

Imports `codec` and `api` only. Start with `stats` (counters of one process, merged in main), rendered by `stats_render` and `prometheus` with the tags of
`tags`; or with `access_log`, which puts together a filter (`access_filters`), a format (`format`, `operators`, `codegen`) and a sink (`sinks`). What all of
them read about a request is in `stream_info`.
"""
