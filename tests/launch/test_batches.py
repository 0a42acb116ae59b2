# SPDX-License-Identifier: Apache-2.0
"""BatchLoader are a function of the step; several prepared folders are one data set, each with its share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core", reason="the data sets need the extra 'megatron'")
pytest.importorskip("tokenizers", reason="the token files need the extra 'launch'")

from data import token_files
from ds_blockwise.runs.reading.problems import Problems
from ds_blockwise.runs.run_file import RunConfig, load_run
from job import batches
from job.batches import BatchLoader, check_data
from tests.helpers.launch.data_corpus import data_config, text, write_lines
from tests.helpers.launch.project import load, make_project, prepare_project

WORDS = {"web": "internet", "books": "chapter", "code": "function"}


@pytest.fixture(scope="module", autouse=True)
def _alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Megatron's blended data set asks for its rank."""
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prepared folders; every sequence says which of them it is from."""
    folder = make_project(tmp_path_factory.mktemp("blend"))
    tokenizer = "train"
    for name, word in WORDS.items():
        write_lines(folder / f"{name}.jsonl", [f"{word} {n} " + f"{word} " * 120 for n in range(60)])
        data = data_config(folder / name, folder / f"{name}.jsonl", tokenizer=tokenizer)
        token_files.prepare(data, 320, "run.yaml")
        tokenizer = str(folder / "web")
    return folder


def _run(project: Path, *blend: str, **training: int) -> tuple[RunConfig, Problems]:
    overrides = [f"training.{key}={value}" for key, value in training.items()]
    run, problems = load_run(project / "run.yaml", overrides=overrides)
    assert run is not None
    return dataclasses.replace(run, data=dataclasses.replace(run.data, blend=blend)), problems


def _origins(rows: list[list[int]], project: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(project / "web" / "tokenizer.json"))
    counts = dict.fromkeys(WORDS, 0)
    for row in rows:
        found = [name for name, word in WORDS.items() if word in tokenizer.decode(row)]
        assert len(found) == 1
        counts[found[0]] += 1
    return counts


def _rows(run: RunConfig, dp_size: int = 1, step: int | None = None) -> list[list[int]]:
    """Sequences of validation, of one step, or (step -1) of the whole training."""
    data = check_data(run, Problems())
    assert data is not None
    found = []
    for dp_rank in range(dp_size):
        loader = BatchLoader(run, data, dp_rank=dp_rank, dp_size=dp_size, device=torch.device("cpu"))
        steps = range(run.training.steps) if step == -1 else [step]
        for each in steps:
            for batch in loader.validation() if each is None else loader.micro_batches(each):
                found += batch.tokens.tolist()
    return found


def test_every_folder_gives_its_share_of_the_samples(project: Path) -> None:
    """Also where a small folder has to be read several times; in validation by the same shares."""
    blend = [f"{share} {project / name}" for share, name in ((6, "web"), (3, "books"), (1, "code"))]
    run, _ = _run(project, *blend, steps=50, validation_sequences=40)
    problems = Problems()
    check_data(run, problems)
    assert problems.lines == []
    drawn = _origins(_rows(run, step=-1), project)
    assert sum(drawn.values()) == 400
    for name, share in (("web", 0.6), ("books", 0.3), ("code", 0.1)):
        assert abs(drawn[name] - 400 * share) <= 2
    assert abs(_origins(_rows(run), project)["web"] - 24) <= 2
    assert min(_origins(_rows(run), project).values()) >= 3


def test_blended_batches_do_not_depend_on_the_number_of_ranks(project: Path) -> None:
    run, _ = _run(project, f"1 {project / 'web'}", f"1 {project / 'books'}")
    assert sorted(_rows(run, 1, 3)) == sorted(_rows(run, 4, 3))
    assert sorted(_rows(run, 1)) == sorted(_rows(run, 2))


def test_blend_of_one_folder_is_that_folder(project: Path) -> None:
    one, _ = _run(project, f"0.3 {project / 'web'}")
    alone, _ = _run(project)
    alone = dataclasses.replace(alone, data=dataclasses.replace(alone.data, directory=str(project / "web")))
    assert _rows(one, step=0) == _rows(alone, step=0)
    assert _rows(one) == _rows(alone)


def test_record_of_a_blend_changes_with_any_of_its_parts(project: Path) -> None:
    """What a resumed run compares: another share or another text is another run."""
    found = [
        check_data(_run(project, f"{share} {project / 'web'}", f"1 {project / other}")[0], Problems())
        for share, other in ((1, "books"), (2, "books"), (1, "code"))
    ]
    records = [record for record in found if record is not None]
    assert len(records) == 3
    assert all(record["tokenizer"] == records[0]["tokenizer"] for record in records)
    assert records[0]["splits"] != records[1]["splits"]
    assert records[0]["splits"] != records[2]["splits"]


def test_samples_of_a_folder_that_was_prepared_again_are_not_the_old_ones(project: Path) -> None:
    """Megatron caches them by path and length, and the cache of a blend is in another folder."""
    source, folder = project / "again.jsonl", project / "again"
    run, _ = _run(project, f"1 {folder}", f"1 {project / 'web'}", steps=20, validation_sequences=4)
    seen = []
    for count in (40, 60):
        write_lines(source, [text(n, 60) for n in range(count)])
        token_files.prepare(data_config(folder, source, tokenizer=str(project / "web")), 320, "run.yaml")
        seen.append(_rows(run, step=-1))
        cached = set((run.data_directory / batches.CACHE).glob("*GPTDataset*document_index.npy"))
    assert seen[0] != seen[1]
    assert len(cached) >= 4


def test_folders_with_different_tokenizers_are_refused(project: Path) -> None:
    other = project / "other"
    token_files.prepare(data_config(other, project / "code.jsonl"), 300, "run.yaml")
    run, problems = _run(project, f"1 {project / 'web'}", f"1 {other}")
    assert check_data(run, problems) is None
    (line,) = problems.lines
    assert f"data.blend = '{other}': allowed: folders that were prepared with one tokenizer" in line
    assert f"--directory {other} --tokenizer {project / 'web'}" in line


def test_every_mistake_in_a_blend_is_listed(project: Path) -> None:
    web, books = project / "web", project / "books"
    entries = [f"0 {web}", f"x {web}", "0.5", f"nan {web}", f"inf {web}", f"1 {web}", f"2 {web}/", f"1 {books}"]
    run, problems = _run(project, *entries, validation_sequences=100_000)
    assert check_data(run, problems) is None
    *mistakes, twice, first, second = problems.lines
    assert len(mistakes) == 5
    for line in mistakes:
        assert "a share above 0 and a prepared folder, such as '0.7 data/web'" in line
    assert "each folder once" in twice
    assert "training.validation_sequences = 100000: allowed: at most" in first
    assert f"what {books} holds for its share of 0.5" in second


def test_missing_folder_is_named_with_the_command_that_makes_it(project: Path) -> None:
    run, problems = _run(project, f"1 {project / 'web'}", f"1 {project / 'nowhere'}")
    assert check_data(run, problems) is None
    assert f"prepare_data.py --run {run.file} --directory {project / 'nowhere'}" in "\n".join(problems.lines)


def test_share_that_is_not_drawn_is_an_error(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = _run(project, f"9 {project / 'web'}", f"1 {project / 'books'}")
    data = check_data(run, Problems())
    assert data is not None
    build = batches.BlendedMegatronDatasetBuilder.build

    def all_of_one(builder):
        train, *others = build(builder)
        train.dataset_index = train.dataset_index * 0
        return [train, *others]

    monkeypatch.setattr(batches.BlendedMegatronDatasetBuilder, "build", all_of_one)
    with pytest.raises(RuntimeError, match=r"web gives 48 of 48 samples, but its share is 0\.9"):
        BatchLoader(run, data, dp_rank=0, dp_size=1, device=torch.device("cpu"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A project with data in one folder."""
    return prepare_project(tmp_path)


def test_prepared_data_must_fit_the_model_and_the_validation(small: Path) -> None:
    model = small / "model.yaml"
    model.write_text(model.read_text(encoding="utf-8").replace("vocab_size: 320", "vocab_size: 300"), encoding="utf-8")
    run, problems = load_run(small / "run.yaml", overrides=["training.validation_sequences=100000"])
    assert run is not None
    check_data(run, problems)
    vocabulary, sequences = problems.lines
    assert "model.yaml: vocab_size = 300: allowed: at least 320" in vocabulary
    assert "run.yaml: training.validation_sequences = 100000: allowed: at most" in sequences


def test_batches_are_a_function_of_the_step_and_cover_each_sample_once(small: Path) -> None:
    """Whatever the number of ranks, one optimizer step sees the same sequences, each once."""
    run, _ = load(small)
    assert run is not None
    data = check_data(run, Problems())
    assert data is not None

    def rows(dp_size: int, step: int | None) -> list[tuple[int, ...]]:
        found = []
        for dp_rank in range(dp_size):
            loader = BatchLoader(run, data, dp_rank=dp_rank, dp_size=dp_size, device=torch.device("cpu"))
            for batch in loader.validation() if step is None else loader.micro_batches(step):
                assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
                assert torch.equal(batch.position_ids[-1], torch.arange(run.shape.sequence_length))
                found += [tuple(row) for row in batch.tokens.tolist()]
        return sorted(found)

    for step in (0, 5):
        whole = rows(1, step)
        assert len(whole) == run.training.global_batch_size
        assert rows(2, step) == whole
        assert rows(4, step) == whole
    assert rows(1, 0) != rows(1, 5)
    validation = rows(1, None)
    assert len(validation) == run.training.validation_sequences
    assert rows(2, None) == validation
    assert rows(4, None) == validation
