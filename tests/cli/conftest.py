"""The data root of the pipeline tests, for other commands."""

from tests.pipeline.conftest import data

__all__ = ["data"]
