"""Categories of emoji from Unicode's list."""

from pathlib import Path

import pytest

from scripts.samples.build import emoji_key, read_emoji_kinds

_LIST = """\
# emoji-test.txt
# group: Animals & Nature

# subgroup: animal-bird
1F414            ; fully-qualified     # E0.6 chicken
# subgroup: plant-flower
1F33A            ; fully-qualified     # E0.6 hibiscus
# group: Objects
# subgroup: other-object
1F6AC            ; fully-qualified     # E0.6 cigarette
# subgroup: keycap
0023 FE0F 20E3   ; fully-qualified     # E0.6 keycap: #
0023 20E3        ; unqualified         # E0.6 keycap: #
#EOF
"""


def test_category_is_subgroup_before_hyphen(tmp_path: Path) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text(_LIST, encoding="utf-8")
    assert read_emoji_kinds(path) == {"1F414": "animal", "1F33A": "plant", "0023 20E3": "keycap"}


def test_code_points_are_normalized() -> None:
    assert emoji_key(["23", "fe0f", "20e3"]) == emoji_key(["0023", "20E3"]) == "0023 20E3"


def test_other_files_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lists no emoji"):
        read_emoji_kinds(path)
