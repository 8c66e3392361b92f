# veneer with its run-time system packages. See docs/how-to/run-in-docker.md for the device and
# capabilities that mounting needs.
FROM debian:bookworm-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements/run.txt requirements/run.txt
RUN python3 -m venv /opt/veneer && /opt/veneer/bin/pip install --no-cache-dir --require-hashes -r requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
# Of setuptools, which nothing needs, a module is imported at each start of this Python.
RUN /opt/veneer/bin/pip install --no-cache-dir --no-deps . && /opt/veneer/bin/pip uninstall --yes setuptools

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends python3 fuse3 libfuse3-3 runc ca-certificates \
    && rm -rf /var/lib/apt/lists/* && echo user_allow_other >> /etc/fuse.conf
COPY --from=build /opt/veneer /opt/veneer
ENV PATH=/opt/veneer/bin:$PATH
VOLUME /var/cache/veneer
ENTRYPOINT ["veneer"]
CMD ["--help"]
