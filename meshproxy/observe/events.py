"""Events that access logs have entries for, by Envoy's names (envoy.data.accesslog.v3.AccessLogType)."""

from __future__ import annotations

NOT_SET = "NotSet"  # a listener's log, at the end of a connection
DOWNSTREAM_START = "DownstreamStart"
DOWNSTREAM_PERIODIC = "DownstreamPeriodic"
DOWNSTREAM_TUNNEL = "DownstreamTunnelSuccessfullyEstablished"
DOWNSTREAM_END = "DownstreamEnd"
TCP_CONNECTED = "TcpUpstreamConnected"
TCP_PERIODIC = "TcpPeriodic"
TCP_END = "TcpConnectionEnd"
