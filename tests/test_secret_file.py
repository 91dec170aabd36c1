"""A secret in a file: what is refused at the start, and what is read while it changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from serving.errors import SettingsError
from serving.secret_file import MAX_BYTES, MIN_BYTES, SecretFile

SECRET = b"a-secret-of-more-than-16-bytes"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"x" * (MIN_BYTES - 1), f"{MIN_BYTES - 1} bytes, not {MIN_BYTES} to {MAX_BYTES}"),
        (b"  " + b"x" * (MIN_BYTES - 1) + b"\n", f"{MIN_BYTES - 1} bytes"),
        (b"x" * (MAX_BYTES + 1), f"{MAX_BYTES + 1} bytes"),
    ],
)
def test_a_secret_that_is_none_is_refused_by_the_name_of_its_setting(
    content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError) as refused:
        SecretFile(str(path)).check("operator_token_file")
    assert str(refused.value).startswith("operator_token_file: ") and words in str(refused.value)
    assert SecretFile(str(path)).read() == b""


def test_one_that_may_come_later_is_read_when_it_has_come(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    file = SecretFile(str(path))
    file.check("operator_token_file", may_come=True)
    assert file.read() == b""
    path.write_bytes(b"short")
    with pytest.raises(SettingsError):
        file.check("operator_token_file", may_come=True)
    # As the kubelet renews a mount: a link that is replaced.
    for number, content in enumerate((SECRET, b"another-secret-of-some-length\n")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "secret").write_bytes(content)
        link = tmp_path / "link"
        link.symlink_to(folder / "secret")
        link.replace(path)
        assert file.read() == content.strip()
    path.unlink()
    assert file.read() == b""


def test_a_folder_is_no_secret(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="Is a directory"):
        SecretFile(str(tmp_path)).check("x")
    assert SecretFile(str(tmp_path)).read() == b""
