FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN useradd --create-home --uid 1000 taskguard
WORKDIR /srv/taskguard

COPY pyproject.toml README.md ./
COPY scripts scripts
COPY taskguard taskguard
COPY workers workers
RUN pip install '.[redis,sql,cli]'

USER taskguard
CMD ["celery", "-A", "workers.app", "worker", "--loglevel", "INFO"]
