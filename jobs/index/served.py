"""A served index, from both sides: who keeps it up (`gristmill serve-index`), and who asks it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import numpy.typing as npt

from jobs.index.query import QueryResult, embedding_spec, hit_of, query_engine, refuse_no_hits, refuse_other_than_texts
from jobs.ray_session import is_joined, ray_session
from jobs.status import open_index
from pipeline.errors import JobError, UserError
from pipeline.index.manifest import read_manifest
from workers import devices
from workers.settings import DEFAULT_ENGINE

if TYPE_CHECKING:
    from workers.serving.index_client import IndexClient
    from workers.serving.served_version import Answer

MAX_SEQUENCES: Final = 64  # texts that the model reads together
LOOK_S: Final = 0.5


@contextmanager
def serving(
    out: Path,
    *,
    address: str | None = None,
    name: str | None = None,
    device: str | None = None,
    engine_factory: str = DEFAULT_ENGINE,
    on_change: Callable[[str], None] = lambda words: None,
) -> Iterator[dict[str, Any]]:
    """Within, the index of the job directory `out` is served on the Ray at `address`, else on one of our own.

    Gives what is served: {"name", "address", "output", "model", "kind", "vectors", "shards", ...}. `name` is what
    clients may call it; without one it is called by its directory. Each new version of the index takes the place of the
    one before; `on_change` hears so, from another thread. UserError where there is no index, the model is another by
    now, or the name is taken.
    """
    folder = open_index(out)
    manifest = read_manifest(folder.index)
    spec = embedding_spec(out, manifest)
    if device is not None:
        spec = spec.model_copy(update={"cluster": spec.cluster.model_copy(update={"device": device})})
    engine = query_engine(manifest.provenance, spec, threads=0, max_sequences=MAX_SEQUENCES, factory=engine_factory)
    joins = is_joined(address)
    with ray_session(address, num_cpus=0 if joins else devices.num_cpus()):
        import ray

        from workers.serving.index_service import IndexService, Serving
        from workers.serving.version_follower import VersionFollower

        service = IndexService(
            Serving(
                name=name or directory_name(out),
                out=str(out.absolute()),
                folder=str(folder.index.absolute()),
                manifest=manifest,
                engine=engine,
                gpu=spec.cluster.device == "cuda",
            )
        )
        follower: VersionFollower | None = None
        try:
            service.wait_ready()
            follower = VersionFollower(service, folder.index, on_change)
            yield {"address": ray.get_runtime_context().gcs_address, **service.about()}
        finally:
            if follower is not None:
                follower.stop()
            service.close()
            if follower is not None:
                follower.join()


class ServedIndex:
    """Asks a served index. Several threads may. Close it, or use it as a context manager."""

    def __init__(self, client: IndexClient, session: ExitStack) -> None:
        self._client = client
        self._session = session
        weakref.finalize(self, session.close)  # at the latest when the interpreter ends, while it can still do so

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves Ray, unless it was connected before."""
        self._client.close()
        self._session.close()

    @property
    def about(self) -> dict[str, Any]:
        """What is served: {"name", "output", "index", "model", "kind", "dimension", "vectors", "shards", "version",
        "asked_by", "shards_asked_by"}. The last two say how queries travel, from here and to the shards: "socket", or
        "ray" where an actor's own port can't be reached."""
        return self._client.about()

    def search(self, texts: Sequence[str], k: int = 10, *, filter: str | None = None) -> list[QueryResult]:
        """The k rows nearest to each text, of those that `filter` means, best first. The served model embeds them.

        UserError for a text that can't be embedded, a filter that is not understood or a k below 1; JobError where no
        answer comes within seconds.
        """
        refuse_other_than_texts(texts)
        refuse_no_hits(k)
        return _results(texts, self._client.search_texts(texts, k, filter))

    def search_vectors(
        self,
        vectors: npt.ArrayLike,
        k: int = 10,
        *,
        names: Sequence[str] | None = None,
        filter: str | None = None,
    ) -> list[QueryResult]:
        """The same for vectors [d] or [n, d] like those in the parts. `names` are what the results call them."""
        refuse_no_hits(k)
        matrix = np.atleast_2d(np.asarray(vectors))
        called = names if names is not None else [f"[{number}]" for number in range(len(matrix))]
        return _results(called, self._client.search_vectors(matrix, k, filter))

    def nearest(
        self, vectors: npt.ArrayLike, k: int = 10, *, filter: str | None = None
    ) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]]:
        """Scores and vector numbers [up to k] for each of the vectors [d] or [n, d], best first.

        No rows are read: rows.parquet says what the numbers are.
        """
        refuse_no_hits(k)
        return self._client.nearest(np.atleast_2d(np.asarray(vectors)), k, filter)


def connect(index: str | Path, address: str | None = None) -> ServedIndex:
    """A client of the index that is served on the Ray at `address` (else RAY_ADDRESS, or the Ray that is connected).

    `index` is its job directory, or the name that it is served as. UserError where it is not served there.
    """
    if not is_joined(address):
        raise UserError("no cluster to ask: give the address that `gristmill serve-index` says, or set RAY_ADDRESS")
    with ExitStack() as session:
        session.enter_context(ray_session(address, num_cpus=0))
        from workers.serving.index_client import IndexClient, served_names

        names = served_names()
        name = str(index)
        if name not in names:
            name = directory_name(Path(index))
        if name not in names:
            name = _own_name(name, names) or str(index)
        return ServedIndex(IndexClient(name), session.pop_all())
    raise AssertionError


def _own_name(directory: str, names: Sequence[str]) -> str | None:
    """Which of `names` the index of the job directory is served under; None where none says so."""
    from workers.serving.index_client import IndexClient

    for name in names:
        with suppress(UserError, JobError):  # one that is just being started, or broken, is not to hide the others
            if directory_name(Path(IndexClient(name).output())) == directory:
                return name
    return None


def directory_name(out: Path) -> str:
    """What the index of a job directory is called where nobody named it."""
    return str(out.expanduser().resolve())


def _results(names: Sequence[str], answer: Answer) -> list[QueryResult]:
    return [
        QueryResult(query=name, hits=tuple(hit_of(row, place, score) for row, place, score in hits))
        for name, hits in zip(names, answer, strict=True)
    ]
