# The sidecar alone: no compiler, no package manager, no shell tools beyond the base image's.
FROM python:3.11-slim AS build
WORKDIR /src
COPY requirements.lock pyproject.toml LICENSE README.md ./
COPY meshproxy meshproxy
COPY control control
# The first section of the lock file is what the sidecar needs.
RUN python -m venv /opt/meshproxy \
 && sed '/^# --- control plane and development/,$d' requirements.lock > runtime.lock \
 && /opt/meshproxy/bin/pip install --no-cache-dir --require-hashes -r runtime.lock \
 && pip wheel --no-cache-dir --no-deps --wheel-dir /wheels . \
 && /opt/meshproxy/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
 && rm -rf /opt/meshproxy/lib/python3.11/site-packages/pip* \
 && /opt/meshproxy/bin/python -m compileall -q /opt/meshproxy/lib \
 # A first start writes the cache of those that follow (meshproxy/start_cache.py), which cannot write themselves.
 && /opt/meshproxy/bin/meshproxy --config-yaml '{admin: {}}' --mode init_only

FROM python:3.11-slim
COPY --from=build /opt/meshproxy /opt/meshproxy
# As Istio's sidecars: a user id that redirection rules can leave out.
RUN useradd --uid 1337 --no-create-home --shell /usr/sbin/nologin meshproxy
USER 1337
ENV PATH=/opt/meshproxy/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# PID 1 itself: it reaps orphans, drains on SIGTERM, and its workers go with it.
ENTRYPOINT ["meshproxy"]
CMD ["-c", "/etc/meshproxy/envoy.yaml"]
