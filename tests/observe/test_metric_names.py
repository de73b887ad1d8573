"""Names of metrics in MLflow."""

import pytest
from mlflow.utils.validation import _validate_metric_name

from muomni.observe.metric_names import mlflow_name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text_recall@1", "text_recall_at_1"),
        ("exact_match.which_of_two", "exact_match.which_of_two"),
        ("wer.a:b|c (d)", "wer.a_b_c _d_"),
    ],
)
def test_mlflow_accepts_every_name(name: str, expected: str) -> None:
    assert mlflow_name(name) == expected
    _validate_metric_name(f"test/{mlflow_name(name)}")
