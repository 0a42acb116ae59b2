# SPDX-License-Identifier: Apache-2.0
"""Token files hold every document once, are the same for any number of processes and kills, in constant memory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("megatron.core", reason="the token files need the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the token files need the extra 'launch'")

from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer

from data import corpus, pool, token_files
from data.check import find_damage
from data.documents import documents
from ds_blockwise.runs.run_file import DataConfig
from tests.helpers.launch.data_corpus import (
    PART,
    begin,
    contents,
    data_config,
    documents_of,
    finished_parts,
    kill_until_done,
    make_corpus,
    prepare,
    start,
    text,
    write_lines,
)
from tests.helpers.launch.project import LAUNCH, load, make_project

MIB = 1 << 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A corpus and its token files, made by one process in one go; and the corpus' documents."""
    folder = tmp_path_factory.mktemp("whole")
    expected = make_corpus(folder / "texts")
    prepare(data_config(folder / "data", folder / "texts"))
    return folder / "texts", folder / "data", expected


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a run file, a model file, a JSON and text; nothing is prepared yet."""
    return make_project(tmp_path)


def test_three_workers_write_the_bytes_of_one(whole: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    texts, data, _ = whole
    prepare(data_config(tmp_path / "data", texts), workers=3)
    assert contents(tmp_path / "data") == contents(data)


def test_merged_files_are_what_megatrons_builder_writes(whole: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    """Joined by reading and writing, they must not differ from documents that were added one by one."""
    _, data, _ = whole
    for split in token_files.SPLITS:
        dataset = IndexedDataset(str(data / split))
        builder = IndexedDatasetBuilder(str(tmp_path / f"{split}.bin"), dtype=dataset.index.dtype)
        for index in range(len(dataset)):
            builder.add_document(dataset[index], [len(dataset[index])])
        builder.finalize(str(tmp_path / f"{split}.idx"))
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"{split}{suffix}").read_bytes() == (data / f"{split}{suffix}").read_bytes()


def test_every_document_is_there_once_on_the_side_that_its_text_decides(
    whole: tuple[Path, Path, list[str]],
) -> None:
    texts, data, expected = whole

    def kept(document: str) -> bool:
        sum_ = hashlib.blake2b(document.encode(), digest_size=8).digest()
        return int.from_bytes(sum_, "big") / 2**64 < 0.2

    train, validation = (documents_of(data, split) for split in token_files.SPLITS)
    whole_texts = [document for document in expected if len(document.encode()) < PART]
    assert len(expected) - len(whole_texts) <= 5  # long texts are cut at lines, for parallel work
    assert not set(whole_texts) - {*train, *validation}
    assert "".join(sorted("".join(train + validation))) == "".join(sorted("".join(expected)))
    read = [
        document
        for part in corpus.Corpus([(str(path), path) for path in sorted(texts.iterdir())], "text").parts(PART)
        for span in part
        if span.path.name != "picture.txt"
        for document in documents(span, "text")
    ]
    assert train == [document for document in read if not kept(document)]  # in the order of the names
    assert validation == [document for document in read if kept(document)]
    metadata = token_files.read_metadata(data)
    assert metadata is not None
    assert metadata["files_skipped_not_utf8"] == [str(texts / "picture.txt")]
    assert metadata["splits"]["train"]["documents"] == len(train)
    assert metadata["splits"]["train"]["characters"] == sum(map(len, train))


def test_split_and_tokenizer_depend_on_no_name_and_no_order(
    whole: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    texts, data, _ = whole
    (tmp_path / "texts").mkdir()
    for number, path in enumerate(sorted(texts.iterdir(), reverse=True)):
        shutil.copy(path, tmp_path / "texts" / f"{number:02d}{''.join(path.suffixes)}")
    metadata = prepare(data_config(tmp_path / "data", tmp_path / "texts"))
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    for split in token_files.SPLITS:
        assert sorted(documents_of(tmp_path / "data", split)) == sorted(documents_of(data, split))
    assert metadata["splits"]["train"]["bin_sha256"] != token_files.read_metadata(data)["splits"]["train"]["bin_sha256"]


def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    whole: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    """Killed while it trains, tokenizes, joins; finished parts are never made again."""
    texts, data, _ = whole
    draw = random.Random(7)
    before = time.monotonic()
    begin(tmp_path / "timed", texts).join()
    takes = time.monotonic() - before
    kills = kept = 0
    while kills < 2 or kept < 1:  # an attempt that was through too soon says nothing: aim earlier
        folder = tmp_path / f"after-{takes:.4f}-seconds"
        kills, kept = kill_until_done(folder, texts, lambda limit=takes: draw.random() * limit)
        assert sorted(contents(folder)) == sorted(contents(data))
        assert contents(folder) == contents(data)
        takes *= 0.7
        assert takes > 0.001, "no attempt went on with another's parts"


def test_command_line_killed_with_two_workers_goes_on_with_one(tmp_path: Path) -> None:
    """Workers end with their parent: left alone they would write for ever into a folder that is no more theirs."""
    project = make_project(tmp_path)
    write_lines(project / "texts" / "long.jsonl", [text(n, 400) for n in range(900)])
    run = ["--run", str(project / "run.yaml"), "--part-megabytes", "0.0625", "--workers"]
    script = [sys.executable, str(LAUNCH / "prepare_data.py"), *run]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([*script, "2"], stdout=log, stderr=log, start_new_session=True)
    folder = project / "data"
    until = time.monotonic() + 120
    while len(finished_parts(folder)) < 2 and time.monotonic() < until:
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while _session(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _session(process.pid)
    before = finished_parts(folder)
    assert len(before) >= 2
    for output in (folder, tmp_path / "other"):
        prepare(data_config(output, project / "texts"), part_bytes=MIB // 16)
    assert contents(folder) == contents(tmp_path / "other")


def _session(leader: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(path.name))
    return found


def _interrupt(data: DataConfig, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Prepare until ``after`` parts are written."""
    write, done = pool.write_part, []

    def limited(*arguments):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(write(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(pool, "write_part", limited)
        with pytest.raises(KeyboardInterrupt):
            prepare(data)


def test_damaged_and_outdated_parts_are_made_again_and_it_says_so(
    whole: tuple[Path, Path, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts, data, _ = whole
    caplog.set_level(logging.INFO)
    folder = tmp_path / "data"
    _interrupt(data_config(folder, texts), monkeypatch, 6)
    first, *_ = sorted((folder / "parts").glob("*.train.bin"), key=lambda p: -p.stat().st_size)
    damaged = bytearray(first.read_bytes())
    damaged[3] ^= 1
    first.write_bytes(damaged)
    prepare(data_config(folder, texts))
    assert "going on: 5 of" in caplog.text
    assert contents(folder) == contents(data)
    assert not (folder / "parts").exists()

    caplog.clear()
    given = data_config(tmp_path / "another", texts, tokenizer=str(data))
    _interrupt(given, monkeypatch, 6)
    prepare(dataclasses.replace(given, validation_fraction=0.3))
    assert "data.validation_fraction changed since" in caplog.text
    assert "6 finished parts can't be used" in caplog.text
    assert "going on" not in caplog.text


def test_changed_file_leaves_the_parts_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a given tokenizer; a trained one may change with any text."""
    caplog.set_level(logging.INFO)
    texts = tmp_path / "texts"
    make_corpus(texts)
    prepare(data_config(tmp_path / "first", texts))
    given = str(tmp_path / "first")
    config = data_config(tmp_path / "data", texts, tokenizer=given)
    _interrupt(config, monkeypatch, 6)
    (texts / "0.txt").write_text(text(999, 50), encoding="utf-8")  # in the first part, with other small files
    prepare(config)
    assert "the files changed since" in caplog.text
    assert "going on: 5 of" in caplog.text
    prepare(data_config(tmp_path / "fresh", texts, tokenizer=given))
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_old_token_files_stay_until_the_new_ones_are_made(
    whole: tuple[Path, Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, data, _ = whole
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "metadata.json").write_text(
        (data / "metadata.json").read_text().replace('"fingerprint": "', '"fingerprint": "x')
    )
    _interrupt(data_config(folder, texts), monkeypatch, 3)
    assert find_damage(folder, token_files.read_metadata(folder), every_token=True) == []


def test_half_written_files_of_a_killed_run_go(whole: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    texts, data, _ = whole
    for name in ("metadata.json.77.partial", "train.bin.partial", "parts/0a.train.77.partial.bin", "parts/0a.json"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    prepare(data_config(tmp_path / "data", texts))
    assert contents(tmp_path / "data") == contents(data)


def test_two_at_once_in_one_folder_are_refused(whole: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    texts, _, _ = whole
    folder = tmp_path / "data"
    folder.mkdir()
    with token_files._alone_in(folder), pytest.raises(ValueError, match=r"another prepare_data\.py is at work there"):
        prepare(data_config(folder, texts))


def test_error_in_a_worker_is_the_users_to_read_and_finished_parts_stay(
    whole: tuple[Path, Path, list[str]], tmp_path: Path
) -> None:
    texts, given = tmp_path / "texts", str(whole[1])  # training one would read the line before any worker
    make_corpus(texts)
    (texts / "zz.jsonl").write_text('{"text": "a"}\n{"text": 7}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"zz\.jsonl, line 2: no text under the key 'text' \(found: text\)"):
        prepare(data_config(tmp_path / "data", texts, tokenizer=given), workers=2)
    assert not (tmp_path / "data" / "metadata.json").exists()
    assert finished_parts(tmp_path / "data")


def _peaks(send: Connection, folder: Path, sizes: list[int], tokenizer: str, part: int) -> None:
    """Peak memory of this process after it has prepared each of the corpora, in MiB."""
    peaks = []
    for size in sizes:
        data = data_config(folder / f"data{size}", folder / f"{size}.jsonl", tokenizer=tokenizer)
        token_files.prepare(data, 320, "run.yaml", part_bytes=part)
        token_files.check_directory(folder / f"data{size}")
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    send.send(peaks)


def _growth(folder: Path, sizes: list[int], tokenizer: str, part: int) -> float:
    """Peak memory after the last size over the one after the first, in MiB."""
    bodies = [text(seed, 300) for seed in range(99)]
    for size in sizes:
        with (folder / f"{size}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(size * MIB // (len(bodies[0]) + 20)):
                file.write(json.dumps({"text": f"{number} {bodies[number % 99]}"}) + "\n")
    receive, send = Pipe(duplex=False)
    process = start(_peaks, send, folder, sizes, tokenizer, part)
    while not receive.poll(0.1):
        assert process.exitcode is None
    process.join()
    first, *_, last = receive.recv()
    return last - first


def test_memory_does_not_grow_with_the_text(whole: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    """In one part. Half of the text, or two bytes of each token, in memory would be more than is allowed."""
    # both token files are larger than the two blocks of 4 MiB with which `sha256_of` reads
    assert _growth(tmp_path, [12, 28], str(whole[1]), 1 << 40) < 6


@pytest.mark.slow
def test_memory_does_not_grow_with_200_megabytes(tmp_path: Path) -> None:
    """In parts of the usual size, with a tokenizer that is trained on a sample of them."""
    assert _growth(tmp_path, [40, 200], "train", corpus.PART_BYTES) < 6


def test_no_validation_document_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [text(n, 9) for n in range(4)])
    with pytest.raises(
        ValueError, match=r"data\.validation_fraction = '0\.001 \(0 of 4 documents\)'.*raise the fraction"
    ):
        prepare(data_config(tmp_path / "data", tmp_path / "a.jsonl", validation_fraction=0.001))


def _data(project: Path, **changes: Any) -> DataConfig:
    run, text = load(project)
    assert run is not None, text
    return dataclasses.replace(run.data, **changes)


def _documents(folder: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(folder / token_files.TOKENIZER))
    dataset = IndexedDataset(str(token_files.token_prefix(folder, split)))
    texts = []
    for index in range(len(dataset)):
        tokens = dataset[index].tolist()
        assert tokens[-1] == tokenizer.token_to_id("<|endoftext|>")
        texts.append(tokenizer.decode(tokens[:-1]))
    return texts


def test_text_and_json_lines_become_tokens_and_back(project: Path) -> None:
    data = _data(project)
    metadata = token_files.prepare(data, 320, "run.yaml")
    folder = Path(data.directory)
    train, validation = (_documents(folder, split) for split in token_files.SPLITS)
    files = [path.read_text(encoding="utf-8") for path in sorted((project / "texts").glob("*.txt"))]
    lines = (project / "texts" / "more.jsonl").read_text(encoding="utf-8").splitlines()
    expected = files + [json.loads(line)["text"] for line in lines]
    assert sorted(train + validation) == sorted(expected)
    assert validation
    assert sorted(validation) == sorted(text for text in expected if corpus.is_validation(text, 0.2))
    assert metadata["splits"]["train"]["documents"] == len(train)
    assert metadata["tokenizer"]["vocab_size"] == 320


def test_no_validation_text_is_trained_on_even_when_files_are_copied(project: Path) -> None:
    """Copies are common in crawled text: a split by file would train on validation documents."""
    for path in sorted((project / "texts").glob("*.txt")):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))
    data = _data(project)
    token_files.prepare(data, 320, "run.yaml")
    train, validation = (set(_documents(Path(data.directory), split)) for split in token_files.SPLITS)
    assert validation
    assert not train & validation


def test_preparation_is_repeated_only_when_something_changed(project: Path) -> None:
    data = _data(project)
    first = token_files.prepare(data, 320, "run.yaml")
    folder = Path(data.directory)
    before = (folder / "train.bin").stat().st_mtime_ns
    assert token_files.prepare(data, 320, "run.yaml") == first
    assert (folder / "train.bin").stat().st_mtime_ns == before

    (folder / token_files.CACHE).mkdir()  # Megatron's sample indices of the old tokens
    (project / "texts" / "00.txt").write_text("new words " * 200, encoding="utf-8")
    second = token_files.prepare(data, 320, "run.yaml")
    assert second["fingerprint"] != first["fingerprint"]
    assert not (folder / token_files.CACHE).exists()
    (folder / "train.bin").write_bytes(b"cut")  # as if the disk had been full
    assert token_files.read_metadata(folder) is None


def test_given_tokenizer_is_used_and_must_fit(project: Path) -> None:
    data = _data(project)
    token_files.prepare(data, 320, "run.yaml")
    given = str(Path(data.directory) / token_files.TOKENIZER)
    other = dataclasses.replace(data, directory=str(project / "other"), tokenizer=given)
    first = token_files.read_metadata(Path(data.directory))
    assert first is not None
    second = token_files.prepare(other, 320, "run.yaml")
    assert second["tokenizer"]["sha256"] == first["tokenizer"]["sha256"]
    with pytest.raises(ValueError, match=r"data\.tokenizer .*at most vocab_size = 300"):
        token_files.prepare(other, 300, "run.yaml")


def test_wrong_sources_are_named(project: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.yaml: data\.source = 'nowhere/\*'"):
        token_files.prepare(_data(project, source=("nowhere/*",)), 320, "run.yaml")
    with pytest.raises(ValueError, match=r"more\.jsonl, line 1: no text under the key 'body' \(found: text, id\)"):
        token_files.prepare(_data(project, text_key="body"), 320, "run.yaml")
    (project / "one").mkdir()
    (project / "one" / "a.txt").write_text("alone", encoding="utf-8")
    with pytest.raises(ValueError, match="at least one document for training and another one for validation"):
        token_files.prepare(_data(project, source=(str(project / "one"),)), 320, "run.yaml")


def test_file_that_is_not_text_is_left_out_and_reported(project: Path) -> None:
    (project / "texts" / "picture.txt").write_bytes(b"\xff\xfe\x00\x80")
    metadata = token_files.prepare(_data(project), 320, "run.yaml")
    assert [Path(name).name for name in metadata["files_skipped_not_utf8"]] == ["picture.txt"]


def test_parquet_and_zstd_become_the_same_tokens_with_three_workers(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="parquet and zstd need the extra 'data'")
    expected = make_corpus(tmp_path / "texts", parquet=True)
    for workers in (1, 3):
        prepare(data_config(tmp_path / f"data{workers}", tmp_path / "texts"), workers=workers)
    assert contents(tmp_path / "data1") == contents(tmp_path / "data3")
    found = [document for split in token_files.SPLITS for document in documents_of(tmp_path / "data1", split)]
    assert len({*expected} - {*found}) <= 5  # long texts are cut at lines
