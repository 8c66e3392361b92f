# veneer with its run-time system packages. See docs/how-to/run-in-docker.md for the device and
# capabilities that mounting needs.
FROM debian:bookworm-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements/run.txt requirements/run.txt
# Wheels come with symbols for debuggers, which are three quarters of their size.
RUN python3 -m venv /opt/veneer && /opt/veneer/bin/pip install --no-cache-dir --require-hashes -r requirements/run.txt \
    && find /opt/veneer -name '*.so' -exec strip --strip-unneeded {} +
COPY pyproject.toml README.md LICENSE ./
COPY packaging/bin packaging/bin
COPY src src
# Of setuptools, which nothing needs, a module is imported at each start of this Python. A build that leaves the command
# out would say nothing.
RUN /opt/veneer/bin/pip install --no-cache-dir --no-deps . && /opt/veneer/bin/pip uninstall --yes setuptools pip \
    && /opt/veneer/bin/veneer --version

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends python3 fuse3 libfuse3-3 runc ca-certificates \
    && rm -rf /var/lib/apt/lists/* && echo user_allow_other >> /etc/fuse.conf
COPY --from=build /opt/veneer /opt/veneer
ENV PATH=/opt/veneer/bin:$PATH
VOLUME /var/cache/veneer
ENTRYPOINT ["veneer"]
CMD ["--help"]
