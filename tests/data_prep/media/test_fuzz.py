"""A short run of `make fuzz`."""

from tests.data_prep.media.fuzz import MEMORY_BYTES, fuzz


def test_mutated_files_give_samples_or_an_error() -> None:
    outcomes, faults, peak_bytes = fuzz(count=160, seed=7, num_workers=1)
    assert not faults
    assert outcomes["decoded"] > 20 and outcomes["refused"] > 20
    assert peak_bytes < 2 * MEMORY_BYTES
