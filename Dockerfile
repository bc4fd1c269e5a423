# quantcli with the CPU build of torch; no compiler, no development packages.
#
#   docker build -t quantcli .
#   docker run --rm -v quantcli-cache:/cache -v "$PWD:/work" quantcli recipes

FROM python:3.11-slim AS build
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY src ./src
COPY recipes ./recipes
COPY examples/calibration.txt ./examples/
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
COPY constraints.txt /wheels/
COPY --from=build /wheels /wheels
RUN python -m pip install --no-cache-dir --constraint /wheels/constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu /wheels/*.whl
# any user can write to the cache, so that `docker run --user` works
RUN useradd --create-home --uid 1000 quantcli \
    && mkdir --parents --mode 1777 /cache \
    && mkdir --parents /work && chown quantcli /work
ENV XDG_CACHE_HOME=/cache
USER quantcli
WORKDIR /work
VOLUME /cache
ENTRYPOINT ["quantcli"]
CMD ["--help"]
