"""Every error says what, where, expected, found and the next step, and has an exit code."""

from __future__ import annotations

import errno
import os
import re

import pytest

from lora_export import EnvironmentUnusable, InputRefused, LoraExportError, UsageProblem
from lora_export.cli.output import Display, guarded
from lora_export.errors import nearest, of_the_system, refused_if_it_fails, some_of


def test_the_message_has_a_line_for_each_part_that_is_given():
    error = InputRefused("It is wrong", where="here", expected="this", found="that", next_step="do so")
    assert str(error).splitlines() == [
        "It is wrong",
        "  where:    here",
        "  expected: this",
        "  found:    that",
        "  next:     do so",
    ]
    assert str(InputRefused("It is wrong", found="")) == "It is wrong"


@pytest.mark.parametrize(("error", "code"), [(UsageProblem, 2), (InputRefused, 3), (EnvironmentUnusable, 4)])
def test_each_kind_has_its_exit_code(error, code):
    found = error("x", where="y").to_dict()
    assert issubclass(error, LoraExportError)
    assert (found["error"], found["exit_code"], found["what"], found["where"]) == (error.__name__, code, "x", "y")


def test_a_long_list_of_names_says_how_many_more_there_are():
    assert some_of(["a", "b", "c"], 2) == "a, b and 1 more"
    assert some_of(["a", "b"], 2) == "a, b" and some_of([], 2) == ""


def failing(error: Exception) -> InputRefused:
    with (
        pytest.raises(InputRefused) as refused,
        refused_if_it_fails("It failed", where="here", next_step="try another"),
    ):
        next(raising(error))
    return refused.value


def raising(error: Exception):
    """Raise in code that is not this package's."""
    raise error
    yield


def test_what_a_library_raises_on_an_input_is_a_refusal():
    found = failing(ValueError("heads do\n not divide"))
    assert (found.what, found.where, found.found) == ("It failed", "here", "heads do not divide")
    assert found.next_step == "try another" and isinstance(found.__cause__, ValueError)
    assert failing(KeyError("rope")).found == "KeyError: 'rope'"


def test_what_may_be_a_librarys_change_names_versions_and_where_to_report_it():
    for error in (TypeError("unexpected keyword"), AttributeError("no x"), ImportError("no y")):
        found = failing(error)
        assert "damaged" not in str(found) and found.found.startswith(type(error).__name__)
        assert re.search(r"transformers \(here \d+\.\d+.*report that: https://", found.next_step)


@pytest.mark.parametrize("error", [MemoryError("x"), OSError(28, "No space left"), InputRefused("another")])
def test_what_is_no_fault_of_the_input_passes(error):
    with pytest.raises(type(error)) as raised, refused_if_it_fails("It failed", where="here", next_step="none"):
        raise error
    assert raised.value is error
    with pytest.raises(MemoryError), refused_if_it_fails("It failed", where="here", next_step="none"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


@pytest.mark.parametrize(
    ("error", "number", "file"),
    [
        (RuntimeError("unable to open file </a/b> in read-only mode: Too many open files (24)"), 24, "/a/b"),
        (RuntimeError("unable to mmap 9 bytes from file </a b>: Cannot allocate memory (12)"), 12, "/a b"),
        (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), 28, None),
    ],
)
def test_an_error_of_the_system_that_a_library_tells_in_words_is_one(error, number, file):
    found = of_the_system(error)
    assert (found.errno, found.strerror, found.filename) == (number, os.strerror(number), file)
    with pytest.raises(OSError) as raised, refused_if_it_fails("It failed", where="here", next_step="none"):
        raise error
    assert raised.value.errno == number and raised.value.__cause__ is error
    with pytest.raises(SystemExit) as ended, guarded(Display(as_json=False, quiet=True)):
        raise error
    assert ended.value.code == 4


@pytest.mark.parametrize(
    "said", ["can't start new thread", "pthread_create failed, error code: 11", "Resource temporarily unavailable"]
)
def test_a_thread_that_the_system_refuses_is_an_error_of_the_system(said, capsys):
    with pytest.raises(SystemExit) as ended, guarded(Display(as_json=False, quiet=True)):
        raise RuntimeError(said)
    told = capsys.readouterr().err
    assert ended.value.code == 4 and said in told and "ulimit -u" in told and "defect" not in told
    assert of_the_system(ValueError(said)) is None


def test_a_file_that_is_there_and_that_safetensors_could_not_open_is_the_systems_error(tmp_path):
    """It says of every such file that there is none."""
    (tmp_path / "file").write_text("")
    found = of_the_system(FileNotFoundError(f"No such file or directory: {tmp_path / 'file'}"))
    assert (found.errno, found.filename) == (errno.EIO, str(tmp_path / "file"))
    assert of_the_system(FileNotFoundError(f"No such file or directory: {tmp_path / 'none'}")) is None
    assert of_the_system(FileNotFoundError(errno.ENOENT, "No such file or directory", str(tmp_path / "file"))) is None


def test_an_error_without_a_number_is_none_of_the_system():
    assert of_the_system(RuntimeError("unable to open file <x>")) is None
    assert of_the_system(OSError(28, "(os error 28)")) is None


def test_a_misspelled_name_is_answered_with_the_nearest():
    assert nearest("topik", ["topic", "kind"]) == "did you mean 'topic'?"
    assert nearest("legal", ["topic", "kind"]) is None and nearest("topic", []) is None


def test_what_was_found_is_told_in_part_where_it_is_long():
    error = InputRefused("No.", found="x" * 5000)
    assert error.found == "x" * 2000 + "…" and len(str(error)) < 2100
