"""Which ranks say what went wrong, and with which exit code all of them leave."""

import pytest

from muomni.errors import DataError, exit_on_error


@pytest.mark.parametrize("is_main", [False, True])
@pytest.mark.parametrize("is_rank_local", [False, True])
def test_a_mistake_of_one_rank_is_said_by_that_rank(
    is_main: bool, is_rank_local: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    error = DataError("the shard is broken")
    error.is_rank_local = is_rank_local
    with pytest.raises(SystemExit) as stop, exit_on_error("train", is_main):
        raise error
    assert stop.value.code == 3
    said = capsys.readouterr().err
    assert said == ("train: the shard is broken\n" if is_main or is_rank_local else "")
