"""Records a line each: what is added to a file that ends in a torn line is read again, and the torn line is not."""

import pytest

from ddpm_jax.json_lines import append_record, read_records


def test_what_is_added_is_read_in_order(tmp_path):
    path = tmp_path / "file"
    assert read_records(path) == []
    records = [{"step": 1, "name": "ä\n"}, {"step": 2}, {"step": 1}]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("torn", ['{"step": 2, "va', '{"step": 2', "{", "\x00\x00"])
def test_a_torn_line_swallows_nothing(torn, tmp_path):
    path = tmp_path / "file"
    append_record(path, {"step": 1})
    path.write_text(path.read_text() + torn)
    append_record(path, {"step": 3})
    assert read_records(path) == [{"step": 1}, {"step": 3}]
    assert path.read_text().splitlines()[1] == torn


def test_a_last_line_that_lacks_only_its_end(tmp_path):
    path = tmp_path / "file"
    path.write_text('{"step": 1}')
    append_record(path, {"step": 2})
    assert read_records(path) == [{"step": 1}, {"step": 2}]


def test_lines_that_are_no_records(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b'3\n\n[1]\nnull\n"text"\n\xff\xfe\n' + b"[" * 100_000 + b'\n{"step": 1}\n')
    assert read_records(path) == [{"step": 1}]
