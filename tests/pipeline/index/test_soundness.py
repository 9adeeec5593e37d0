"""Files that were changed by someone who also wrote their new hashes into index.json: no crash, no foreign answers."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest

from pipeline.commits import CommitLog
from pipeline.durable import file_sha256, read_sealed, seal
from pipeline.errors import JobError, UserError
from pipeline.index.build import build_index
from pipeline.index.check import IndexedParts, index_problems
from pipeline.index.deletions import delete_vectors
from pipeline.index.manifest import Provenance, read_manifest
from pipeline.index.row_map import SCHEMA
from pipeline.index.search import VectorIndex
from pipeline.index.versions import change_index
from pipeline.indexed_jobs import job_folder
from pipeline.job_folder import JobFolder, write_job

Committed = Callable[..., tuple[JobFolder, CommitLog]]
ROOT = Path(__file__).parents[3]
NUM_VECTORS, DIMENSION = 60, 8
KINDS = [
    "Flat",
    "IVF4,Flat",
    "IVF4,SQ8",
    "HNSW4",
    "SQ8",
    "PQ2x4",
    "IVF2,PQ2x4",
    "HNSW4,SQ8",
    "PCA4,IVF2,PQ2x4",
    "SQ8,RFlat",
    "IVF2,PQ2x4fs",
]
NUM_MUTATIONS = 60  # a kind

# Run in a process of its own, so that a crash is seen as one. Arguments: folders of indexes; answers in JSON.
CHILD = """
import json, random, sys
from pathlib import Path
import faiss, numpy as np
from pipeline.durable import file_sha256, read_sealed, seal
from pipeline.errors import JobError, UserError
from pipeline.index.search import VectorIndex

ODD = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1, 59, 61, 600]
faiss.omp_set_num_threads(1)
chance = random.Random(0)
refused, answered, wrong = 0, 0, []
queries = np.random.default_rng(1).normal(size=(4, %(dimension)d)).astype(np.float32)

def mutated(content):
    place = chance.choice([chance.randrange(min(len(content), 160)), chance.randrange(len(content)),
                           len(content) - 1 - chance.randrange(min(len(content), 600))])
    changed = bytearray(content)
    match chance.randrange(5):
        case 0:
            changed[place] ^= 1 << chance.randrange(8)
        case 1:
            changed[place] = chance.randrange(256)
        case 2:
            changed[place : place + 8] = chance.choice(ODD).to_bytes(8, "little")
        case 3:
            changed[place : place + 4] = (chance.choice(ODD) %% 2**32).to_bytes(4, "little")
        case _:
            del changed[place:]
    return bytes(changed)

for name in sys.argv[2:]:
    folder = Path(name)
    manifest = read_sealed(folder / "index.json")
    entries = [*manifest["shards"], manifest["rows"], manifest["deleted"]]
    for turn in range(%(mutations)d):
        entry = entries[turn %% len(entries)]
        path = folder / entry["file"]
        before = path.read_bytes()
        path.write_bytes(mutated(before))
        honest = dict(entry)
        entry |= {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
        (folder / "index.json").write_bytes(seal(manifest))
        print(name, turn, file=sys.stderr, flush=True)
        try:
            hits = [hit for found in VectorIndex.open(folder).search(queries, 5) for hit in found]
            answered += 1
            wrong += [f"{name} {turn}: {hit}" for hit in hits if not (0 <= hit.vector < %(vectors)d)]
        except (JobError, UserError) as error:
            refused += 1
            wrong += [f"{name} {turn}: {error}"] if "\\n" in str(error) or str(folder) not in str(error) else []
        path.write_bytes(before)
        entry.update(honest)
print(json.dumps({"refused": refused, "answered": answered, "wrong": wrong}))
"""


def unit(num: int) -> npt.NDArray[np.float32]:
    vectors = np.random.default_rng(0).normal(size=(num, DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def built(committed: Committed, provenance: Provenance) -> Callable[..., tuple[JobFolder, CommitLog]]:
    def build(kind: str = "Flat", *, name: str = "out", **options: Any) -> tuple[JobFolder, CommitLog]:
        folder, log = committed(unit(NUM_VECTORS), name=name)
        build_index(folder, log.commits, job="mine", provenance=provenance, kind=kind, recall=0.0, threads=1, **options)
        return folder, log

    return build


def reseal(folder: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Index.json changed, with the hashes of the files as they are now and a checksum of its own."""
    manifest = read_sealed(folder / "index.json")
    others = [manifest[name] for name in ("center", "deleted") if manifest[name] is not None]
    for entry in (*manifest["shards"], manifest["rows"], *others):
        entry |= {"sha256": file_sha256(folder / entry["file"]), "size_bytes": (folder / entry["file"]).stat().st_size}
    change(manifest)
    (folder / "index.json").write_bytes(seal(manifest))


def test_a_few_hundred_changed_files_with_right_hashes_never_crash_and_never_answer_out_of_range(
    built: Callable[..., tuple[JobFolder, CommitLog]],
) -> None:
    folders = []
    for number, kind in enumerate(KINDS):
        folder, _ = built(kind, name=f"job-{number}", shards=1 + number % 2)
        change_index(folder, lambda draft, manifest: delete_vectors(draft, manifest, np.arange(0, 60, 7)))
        folders.append(str(folder.index))
    code = CHILD % {"dimension": DIMENSION, "mutations": NUM_MUTATIONS, "vectors": NUM_VECTORS}
    done = subprocess.run(
        [sys.executable, "-c", code, "-", *folders], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, f"died of {done.returncode} at {done.stderr.splitlines()[-1]}"
    outcome = json.loads(done.stdout)
    assert outcome["wrong"] == []
    assert outcome["refused"] > 100
    assert outcome["answered"] > 100, "a changed value of a vector is no contradiction"


def test_numbers_that_lead_out_of_the_shard_or_stand_twice_are_refused(
    built: Callable[..., tuple[JobFolder, CommitLog]],
) -> None:
    folder, log = built("IVF4,Flat", shards=2)
    path = folder.index / "shard-001.faiss"
    whole = path.read_bytes()
    for number in (29, 60, 2**40, -1, 31):  # 30 to 59 are right, and 31 is there already
        path.write_bytes(whole)
        index: Any = faiss.read_index(str(path))
        lists = index.invlists
        for place in range(lists.nlist):
            ids = faiss.rev_swig_ptr(lists.get_ids(place), lists.list_size(place))
            ids[ids == 30] = number
        faiss.write_index(index, str(path))
        reseal(folder.index)
        with pytest.raises(JobError, match=r"shard-001.faiss is not sound: its vectors are not numbered .* 30 to 59"):
            VectorIndex.open(folder.index)
        problems = list(
            index_problems(
                folder, read_manifest(folder.index), [IndexedParts(folder, log.commits)], parts_are_whole=True
            )
        )
        assert any("are not numbered" in problem for problem in problems)
    path.write_bytes(whole)
    reseal(folder.index)
    assert VectorIndex.open(folder.index).search(unit(NUM_VECTORS)[40], 1, threads=1)[0][0].vector == 40


def filled(kind: str, metric: int = faiss.METRIC_INNER_PRODUCT) -> Any:
    index: Any = faiss.index_factory(DIMENSION, kind, metric)
    index.train(unit(NUM_VECTORS))
    index.add(unit(NUM_VECTORS))
    return index


def with_nan() -> Any:
    index: Any = faiss.IndexFlatIP(DIMENSION)
    vectors = unit(NUM_VECTORS)
    vectors[7, 3] = np.nan
    index.add(vectors)
    return index


def with_ids(inner: Any) -> Any:
    index: Any = faiss.IndexIDMap2(inner)
    index.train(unit(NUM_VECTORS))
    index.add_with_ids(unit(NUM_VECTORS), np.arange(NUM_VECTORS))
    index.metric_type = faiss.METRIC_INNER_PRODUCT
    return index


def with_ids_that_lead_out() -> Any:
    """The map's numbers are right, and those that lead into the map are not."""
    index = with_ids(faiss.index_factory(DIMENSION, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT))
    lists = faiss.extract_index_ivf(index).invlists
    place = next(place for place in range(4) if lists.list_size(place))
    faiss.rev_swig_ptr(lists.get_ids(place), 1)[0] = 2**40
    return index


def searched_wide() -> Any:
    index = filled("HNSW4")
    index.hnsw.efSearch = 2**31 - 1
    return index


def untrained() -> Any:
    index = filled("IVF4,Flat")
    index.is_trained = False
    return index


@pytest.mark.parametrize(
    ("kind", "make", "said"),
    [
        ("Flat", lambda: filled("HNSW4"), "it is a IndexHNSWFlat, and index.json says Flat"),
        ("Flat", with_nan, "it holds NaN or infinities"),
        ("IVF4,Flat", lambda: filled("Flat"), "index.json wants it searched with an effort of"),
        ("SQ8", lambda: with_ids(faiss.IndexFlatL2(DIMENSION)), "its IndexFlatL2 does not compare by inner product"),
        ("SQ8", with_ids_that_lead_out, "its vectors are not numbered as index.json says, 0 to 59"),
        ("HNSW4", searched_wide, "to be searched with a width of 2147483647"),
        ("IVF4,Flat", untrained, "its IndexIVFFlat was not trained"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_index_in_the_place_of_a_shard_is_refused(
    built: Callable[..., tuple[JobFolder, CommitLog]], kind: str, make: Callable[[], Any], said: str
) -> None:
    folder, _ = built(kind)
    faiss.write_index(make(), str(folder.index / "shard-000.faiss"))
    reseal(folder.index)
    with pytest.raises(JobError) as refused:
        VectorIndex.open(folder.index)
    assert "shard-000.faiss is not sound: " in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [*KINDS, "IVF4_HNSW4,Flat", "PCA4,Flat", "L2norm,SQ8"])
def test_what_was_built_is_sound(built: Callable[..., tuple[JobFolder, CommitLog]], kind: str) -> None:
    folder, log = built(kind, shards=2)
    assert VectorIndex.open(folder.index).search(unit(NUM_VECTORS)[3], 2)[0]
    assert not list(
        index_problems(folder, read_manifest(folder.index), [IndexedParts(folder, log.commits)], parts_are_whole=True)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(dimension="8"), "dimension: input should be a valid integer"),
        (lambda m: m.update(num_vectors=61), "its shards have 60 of 61 vectors"),
        (lambda m: m["rows"].update(num_vectors=59), "its rows.parquet have 59 of 60 vectors"),
        (lambda m: m["rows"].update(file="../parts/part-000000.parquet"), "is no name of a file in its folder"),
        (lambda m: m["shards"][0].update(file="/etc/passwd"), "'/etc/passwd' is no name of a file"),
        (lambda m: m["shards"][0].update(first_vector=1), "shard-000.faiss begins with vector 1, not 0"),
        (lambda m: m["shards"][0].update(num_vectors=-60), "shard-000.faiss holds less than nothing"),
        (lambda m: m["shards"].append(copy.deepcopy(m["shards"][0])), "it names a file twice"),
        (lambda m: m.update(dimension=0, shards=[], num_vectors=0), "no vector has a width of 0"),
        (lambda m: m.update(metric="l2"), "metric: input should be 'inner_product'"),
        (lambda m: m["provenance"].update(normalisation="l1"), "normalisation: input should be 'unit' or 'none'"),
    ],
)  # fmt: skip
def test_an_index_json_that_contradicts_itself_is_refused_before_a_file_is_opened(
    built: Callable[..., tuple[JobFolder, CommitLog]],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, Any]], None],
    said: str,
) -> None:
    folder, _ = built()
    reseal(folder.index, change)
    monkeypatch.setattr(faiss, "read_index", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(JobError) as refused:
        VectorIndex.open(folder.index)
    assert f"{folder.index / 'index.json'} is not sound: " in str(refused.value)
    assert said in str(refused.value)


ODD_VALUES: list[Any] = [
    -1,
    0,
    2**31,
    2**70,
    0.5,
    True,
    None,
    "",
    "../x",
    "x" * 5000,
    "\0",
    [],
    {},
    [[]],
    "Flat",
    "HNSW4",
]


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of all that can be replaced in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from leaves(inner)


def test_whatever_stands_in_index_json_there_is_an_answer_or_one_line(
    built: Callable[..., tuple[JobFolder, CommitLog]],
) -> None:
    chance = random.Random(2)
    for kind in ("IVF4,Flat", "HNSW4"):
        folder, _ = built(kind, name=kind, shards=2)
        change_index(folder, lambda draft, manifest: delete_vectors(draft, manifest, np.array([3, 40])))
        whole = read_sealed(folder.index / "index.json")
        for _ in range(150):
            manifest = copy.deepcopy(whole)
            container, key = chance.choice(list(leaves(manifest)))
            container[key] = chance.choice(ODD_VALUES)
            (folder.index / "index.json").write_bytes(seal(manifest))
            said = ""
            try:
                hits = VectorIndex.open(folder.index).search(unit(2), 3, threads=1)
                assert all(0 <= hit.vector < NUM_VECTORS for found in hits for hit in found), (key, container[key])
            except (JobError, UserError) as error:
                said = str(error)
            assert "\n" not in said


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("vector", [*range(1, NUM_VECTORS), 0]),
        ("row", [None] * NUM_VECTORS),
        ("job", [None] * NUM_VECTORS),
        ("row", [str(row) for row in range(NUM_VECTORS)]),
        ("another", list(range(NUM_VECTORS))),
    ],
)
def test_a_map_of_rows_that_does_not_say_what_a_vector_belongs_to_is_one_line(
    built: Callable[..., tuple[JobFolder, CommitLog]], name: str, column: list[Any]
) -> None:
    import pyarrow as pa

    folder, _ = built()
    path = folder.index / "rows.parquet"
    table = pq.read_table(path)
    values = pa.array(column, None if isinstance(column[-1], str) or name == "another" else SCHEMA.field(name).type)
    place = table.column_names.index(name) if name in table.column_names else 0
    table = table.remove_column(place).add_column(place, name, values)
    pq.write_table(table, path)
    reseal(folder.index)
    with pytest.raises(JobError, match=r"rows.parquet (can't be read|does not say what vector)"):
        VectorIndex.open(folder.index).search(unit(1), 3, threads=1)


def test_a_map_of_fewer_rows_is_one_line(built: Callable[..., tuple[JobFolder, CommitLog]]) -> None:
    folder, _ = built()
    path = folder.index / "rows.parquet"
    pq.write_table(pq.read_table(path).slice(0, 30), path)
    reseal(folder.index)
    with pytest.raises(JobError, match=r"rows.parquet can't be read"):
        VectorIndex.open(folder.index).search(unit(NUM_VECTORS)[50], 1, threads=1)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"vector": [3, 41]}, None),
        ({"vector": [40, 3]}, "does not list 2 vectors"),
        ({"vector": [3, 3]}, "does not list 2 vectors"),
        ({"vector": [3, None]}, "does not list 2 vectors"),
        ({"vector": [3, 60]}, "does not list 2 vectors"),
        ({"vector": [-1, 3]}, "does not list 2 vectors"),
        ({"vector": [3]}, "does not list 2 vectors"),
        ({"vector": range(60)}, "does not list 2 vectors"),
        ({"number": [3, 40]}, "is no list of vector numbers"),
        ({"vector": ["3", "40"]}, "is no list of vector numbers"),
        ({"vector": [3, 40], "row": [3, 40]}, "is no list of vector numbers"),
        (b"PAR1 and what not", "can't be read"),
        (b"", "can't be read"),
    ],
)
def test_a_list_of_deletions_that_is_none_is_one_line(
    built: Callable[..., tuple[JobFolder, CommitLog]], table: Any, said: str | None
) -> None:
    import pyarrow as pa

    folder, log = built()
    change_index(folder, lambda draft, manifest: delete_vectors(draft, manifest, np.array([3, 40])))
    path = folder.index / "deleted.parquet"
    path.unlink()
    if isinstance(table, bytes):
        path.write_bytes(table)
    else:
        pq.write_table(pa.table({name: list(values) for name, values in table.items()}), path)
    reseal(folder.index)
    if said is None:
        assert len(VectorIndex.open(folder.index).search(unit(1), 100, threads=1)[0]) == 58
        return
    with pytest.raises(JobError, match=rf"deleted\.parquet {said}"):
        VectorIndex.open(folder.index)
    parts = [IndexedParts(folder, log.commits)]
    problems = list(index_problems(folder, read_manifest(folder.index), parts, parts_are_whole=True))
    assert any(said in problem for problem in problems)


@pytest.mark.parametrize("path", ["/", "/tmp/out", "", "a\0b", "../nowhere", "index", "../other"])
def test_a_path_that_leads_to_no_directory_of_that_job_is_one_line(
    built: Callable[..., tuple[JobFolder, CommitLog]], path: str
) -> None:
    """A path from here to the job's own directory may lead anywhere; another job's rows are never shown for its."""
    folder, _ = built()
    other, _ = built(name="other")
    write_job(other, fingerprint="another job", document={"spec": {}})
    reseal(folder.index, lambda manifest: manifest["jobs"][0].update(path=path))
    with pytest.raises(JobError, match=r"is no path from here|there is no job directory there|is another job's by now"):
        job_folder(folder.root, read_manifest(folder.index).jobs[0])


def test_a_mean_of_other_numbers_is_one_line(built: Callable[..., tuple[JobFolder, CommitLog]]) -> None:
    folder, _ = built(center=True)
    for mean in (np.full(DIMENSION, np.nan, np.float32), np.zeros(DIMENSION + 1, np.float32), np.zeros(DIMENSION)):
        np.save(folder.index / "center.npy", mean)
        reseal(folder.index)
        with pytest.raises(JobError, match=r"center\.npy does not hold one vector"):
            VectorIndex.open(folder.index)
