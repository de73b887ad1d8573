"""Which ranks print an error, and the exit code."""

import pytest

from muomni.errors import DataError, exit_on_error


@pytest.mark.parametrize("is_main", [False, True])
@pytest.mark.parametrize("is_rank_local", [False, True])
def test_main_rank_or_failing_rank_prints_the_error(
    is_main: bool, is_rank_local: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    error = DataError("the shard is broken")
    error.is_rank_local = is_rank_local
    with pytest.raises(SystemExit) as stop, exit_on_error("train", is_main):
        raise error
    assert stop.value.code == 3
    output = capsys.readouterr().err
    assert output == ("train: the shard is broken\n" if is_main or is_rank_local else "")
