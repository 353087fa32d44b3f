# docker build -t brainseg .
# mkdir -p out
# docker run --rm --gpus all --user "$(id -u):$(id -g)" \
#     -v /path/to/kaggle_3m:/data:ro -v "$PWD/out:/out" brainseg \
#     inference.py --images /data --predictions /out/predictions --figure /out/dsc.png
# docker run --rm -p 127.0.0.1:7860:7860 brainseg app.py --host 0.0.0.0
#
# Another base, with or without PyTorch: docker build --build-arg BASE=python:3.12-slim -t brainseg .
ARG BASE=pytorch/pytorch:2.13.0-cuda12.6-cudnn9-runtime
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    XDG_CACHE_HOME=/tmp/cache \
    MPLCONFIGDIR=/tmp/cache/matplotlib

# Dependencies before code, so a change to the code does not reinstall them. The PyTorch of the
# base image, built for its CUDA, is kept.
COPY requirements.txt requirements-app.txt requirements-dicom.txt /tmp/
RUN python3 -m pip install -r /tmp/requirements-app.txt -r /tmp/requirements-dicom.txt

WORKDIR /app
COPY . .
# Any user may run it (with docker run --user "$(id -u)", files on mounted folders belong to you).
RUN useradd --create-home --uid 10001 brainseg \
    && mkdir -p /out /app/weights && chown -R brainseg /out /app/weights
USER brainseg

ENTRYPOINT ["python3"]
CMD ["inference.py", "--help"]
