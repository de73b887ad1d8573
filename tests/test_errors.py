"""Which ranks print an error, and the exit code of all ranks."""

import pytest

from muomni.errors import DataError, exit_on_error


@pytest.mark.parametrize("is_main", [False, True])
@pytest.mark.parametrize("is_of_one_rank", [False, True])
def test_error_of_one_rank_is_printed_by_that_rank(
    is_main: bool, is_of_one_rank: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    error = DataError("the shard is broken")
    error.is_of_one_rank = is_of_one_rank
    with pytest.raises(SystemExit) as stop, exit_on_error("train", is_main):
        raise error
    assert stop.value.code == 3
    printed = capsys.readouterr().err
    assert printed == ("train: the shard is broken\n" if is_main or is_of_one_rank else "")
