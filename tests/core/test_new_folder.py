"""A folder appears whole or not at all, whoever else makes the same one."""

import multiprocessing
from pathlib import Path

import pytest

from diffing_core.new_folder import new_folder, passing_folder


def make(target: Path, barrier, text: str) -> None:
    with new_folder(target) as folder:
        (folder / "weights").write_text(text)
        barrier.wait()


def test_of_two_processes_at_once_both_succeed_and_one_folder_stays(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=make, args=(tmp_path / "made", barrier, text)) for text in ("one", "two")]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert [each.name for each in tmp_path.iterdir()] == ["made"]
    assert (tmp_path / "made" / "weights").read_text() in ("one", "two")


def test_what_fails_leaves_nothing_and_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), new_folder(tmp_path / "made") as folder:
        (folder / "weights").write_text("half")
        raise ValueError("broken")
    assert not list(tmp_path.iterdir())
    (tmp_path / "made").write_text("a file")
    with pytest.raises(NotADirectoryError), new_folder(tmp_path / "made"):
        pass


def test_a_passing_folder_lies_in_its_parent_and_is_gone_afterwards_even_after_an_error(tmp_path: Path) -> None:
    with passing_folder(tmp_path / "home") as folder:
        (folder / "weights").write_text("many")
        assert folder.parent == tmp_path / "home"
    with pytest.raises(RuntimeError, match="full"), passing_folder(tmp_path / "home") as folder:
        (folder / "weights").write_text("many")
        raise RuntimeError("full")
    assert list((tmp_path / "home").iterdir()) == []
