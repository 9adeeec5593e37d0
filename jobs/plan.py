"""`gristmill plan`: what a job would do, what that takes, and about how long. Reads, and changes nothing.

Tokens are counted on a sample of rows. Time is the arithmetic of those tokens over what this machine's matrix product
does just now, times a measured share; where the job runs elsewhere, no time is given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from jobs.cluster.hosts import refuse_wishes_of_nodes
from jobs.embedding import vector_width
from jobs.experts.placement_outlook import placement_outlook
from jobs.experts.placements import ExpertLayers
from jobs.fleet import this_machine
from jobs.layout import Layout, choose_layout
from jobs.planned_index import most_vectors, planned_index
from jobs.ray_session import address_of
from jobs.resolve import ResolvedJob, resolve
from jobs.spec import JobSpec, JsonObject
from jobs.status import job_status
from jobs.terminal import human_bytes, human_seconds
from jobs.token_estimate import TokenEstimate, estimate_tokens
from jobs.worker_settings import engine_settings
from pipeline.index.kinds import FLAT, next_kind
from pipeline.job_folder import JobFolder
from workers import devices
from workers.forecast import EFFICIENCY, Forecast, forecast


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    job: ResolvedJob
    shard: Forecast
    address: str | None  # of the Ray that is joined; None: one of the job's own
    layout: Layout | None  # None: settled when the cluster is joined
    tokens: TokenEstimate
    max_new_tokens: int  # a row, all of its samples together
    embeds_generation: bool
    dimension: int  # of a vector; 0 where nothing is embedded
    seconds: float | None  # None: not estimated
    output: str  # what is at output.path
    experts: str = ""  # where a gang holds them; "" where no gang is planned

    def describe(self) -> str:
        """For people, a line a subject."""
        spec, shard = self.job.spec, self.shard
        rows, splits, files = self.job.source.num_rows, self.job.splits, len(self.job.source.files)
        asked = [name for name in ("generate", "embed", "index") if getattr(spec, name) is not None]
        lines = [
            (spec.name, ", ".join(asked)),
            (
                "model",
                f"{spec.model}: {shard.architecture}, {shard.num_layers} layers, {_weights(shard)}",
            ),
            ("parts", shard.parts),
            (
                "input",
                f"{rows:,} rows in {files:,} file{'s' if files > 1 else ''}; {len(splits):,} splits of up to "
                f"{max(split.num_rows for split in splits):,} rows",
            ),
            ("tokens", self._tokens()),
            ("memory", self._memory()),
            ("where", self._where()),
            ("time", self._time()),
            ("output", self.output),
        ]
        if spec.attention is not None:
            lines.insert(2, ("attention", shard.attention))
        if self.experts:
            lines.insert([name for name, _ in lines].index("time"), ("experts", self.experts))
        if self.tokens.errors:
            failed = ", ".join(f"{count} {code}" for code, count in self.tokens.errors.most_common())
            lines.insert(
                [name for name, _ in lines].index("tokens") + 1,
                ("errors", f"in the sample of {self.tokens.sampled_rows} rows: {failed}"),
            )
        width = max(len(name) for name, _ in lines[1:])
        return "\n".join([f"{lines[0][0]}: {lines[0][1]}", *(f"  {name:{width}}  {text}" for name, text in lines[1:])])

    def _tokens(self) -> str:
        rows, found = self.job.source.num_rows, self.tokens
        parts = []
        if found.prompt:
            parts.append(f"about {rows * found.prompt:,.0f} to read ({found.prompt:,.0f} a row")
            parts[-1] += f", the first {found.shared} of them computed once)" if found.shared else ")"
        if self.max_new_tokens:
            parts.append(f"at most {rows * self.max_new_tokens:,} to generate")
        if found.passage:
            parts.append(f"about {rows * found.passage:,.0f} to embed ({found.passage:,.0f} a row)")
        return ", ".join(parts) + f"; counted on {found.sampled_rows} rows"

    def _memory(self) -> str:
        shard, spec = self.shard, self.job.spec
        ranks = self.layout.ranks if self.layout is not None else 1
        spare = self.layout.spare_experts if self.layout is not None else 0
        weights = shard.rank_weight_bytes(ranks) + spare * shard.bytes_of_an_expert
        weights_text = f"{human_bytes(weights)} of weights ({shard.dtype}"
        if ranks > 1:
            weights_text += f"; all experts of the replica together: {human_bytes(shard.expert_bytes)}"
        parts = [f"{weights_text})", f"at most {human_bytes(shard.kv_cache_bytes)} of KV cache"]
        text = f"a {'shard' if ranks > 1 else 'replica'}: {', '.join(parts)}"
        if spec.embed is not None and spec.index is not None:
            text += f"; index: {self._index(most_vectors(spec, self.job.source.num_rows))}"
        return text

    def _index(self, vectors: int) -> str:
        asked = self.job.spec.index
        if asked is None:
            return "none"
        (kind, *others), budget = planned_index(asked, num_vectors=vectors, dimension=self.dimension)
        text = (
            f"{kind}, {human_bytes(budget.index_bytes)} for {vectors:,} vectors in {budget.shards} "
            f"shard{'s' if budget.shards > 1 else ''}; building it takes up to "
            f"{human_bytes(budget.peak_bytes(budget.side_by_side))} more than the process itself"
        )
        after = next_kind((kind, *others), [kind])
        if kind != FLAT and after is not None:
            text += f" (if it misses a recall of {asked.recall:g}, {after} is next)"
        return text

    def _where(self) -> str:
        cluster, layout = self.job.spec.cluster, self.layout
        ray = f"the Ray cluster at {self.address}" if self.address else "this machine, in a Ray of the job's own"
        if layout is None:
            asked = f"replicas {cluster.replicas}, expert_parallel {cluster.expert_parallel}"
            return f"{asked}, on {ray}; what is auto is chosen from its devices and their memory when it is joined"
        shards = f"{layout.replicas} replica{'s' if layout.replicas > 1 else ''}"
        if layout.ranks > 1:
            shards += f" of {layout.ranks} shards that share the experts"
        reason = f"; expert_parallel is {layout.ranks}: {layout.why}" if self.shard.num_experts else ""
        return f"{shards} on {layout.device}, {layout.threads} threads each, on {ray}{reason}"

    def _time(self) -> str:
        if self.seconds is None or self.shard.flops_per_s is None:
            return "not estimated: the job does not run on this machine's processor"
        most = "up to" if self.max_new_tokens else "about"
        return (
            f"{most} {human_seconds(self.seconds)}, if steps reach {EFFICIENCY:.0%} of the "
            f"{self.shard.flops_per_s / 1e9:,.0f} GFLOP/s that a matrix product did here just now"
        )


def make_plan(spec: JobSpec) -> Plan:
    """UserError and JobError as running the job would raise them, as far as that shows before the model is loaded."""
    job = resolve(spec)
    settled, cluster = job.spec, job.spec.cluster
    engine = engine_settings(settled, job.model_path)
    address, layout = address_of(cluster.address), None
    if address is None:
        refuse_wishes_of_nodes(cluster)
        layout = choose_layout(
            cluster,
            [this_machine()],
            model=lambda device: forecast(replace(engine, device=device), measures=False),
            gpu_bytes=devices.gpu_bytes,
        )
        engine = replace(engine, device=layout.device, threads=layout.threads, sharers=layout.sharers)
    shard = forecast(engine)
    tokens = estimate_tokens(job, shard.max_context)
    out = Path(settled.output.path)
    earlier = job_status(out) if (out / "job.json").is_file() else None
    new_tokens = settled.generate.max_new_tokens * settled.generate.n if settled.generate is not None else 0
    embeds_generation = settled.embed is not None and settled.embed.of != "prompt"
    return Plan(
        job=job,
        shard=shard,
        address=address,
        layout=layout,
        tokens=tokens,
        max_new_tokens=new_tokens,
        embeds_generation=embeds_generation,
        dimension=vector_width(settled.embed, shard.hidden_width, shard.router_width) if settled.embed else 0,
        seconds=None
        if layout is None
        else _seconds(job, shard, tokens, new_tokens, embeds_generation, num_shards=layout.num_shards),
        output=_output(job, earlier),
        experts=_experts(job, earlier, layout, shard),
    )


def _seconds(
    job: ResolvedJob,
    shard: Forecast,
    tokens: TokenEstimate,
    new_tokens: int,
    embeds_generation: bool,
    *,
    num_shards: int,
) -> float | None:
    if shard.flops_per_s is None:
        return None
    rows, cost = job.source.num_rows, shard.cost
    total = cost.flops(
        tokens=rows * max(0.0, tokens.prompt - tokens.shared) + tokens.shared,
        chosen=0,
        context=(tokens.prompt + tokens.shared) / 2,
    )
    total += cost.flops(tokens=rows * new_tokens, chosen=rows * new_tokens, context=tokens.prompt + new_tokens / 2)
    total += cost.flops(tokens=rows * tokens.passage, chosen=0, context=tokens.passage / 2)
    if embeds_generation:
        total += cost.flops(tokens=rows * new_tokens, chosen=0, context=new_tokens / 2)
    return total / (shard.flops_per_s * num_shards * EFFICIENCY)


def _output(job: ResolvedJob, earlier: JsonObject | None) -> str:
    """`earlier`: the status of what is at output.path."""
    out = Path(job.spec.output.path)
    if earlier is None:
        return f"{out}, which is new"
    if earlier["fingerprint"] != job.fingerprint:
        return f"{out}, which holds another job: running this one there will be refused"
    rows = earlier["rows"]
    return f"{out}, where {rows['done']:,} of {rows['total']:,} rows are done: running goes on from there"


def _experts(job: ResolvedJob, earlier: JsonObject | None, layout: Layout | None, shard: Forecast) -> str:
    if layout is None and shard.num_experts and job.spec.cluster.calibration_rows != 0:
        return "where several shards share them, placed by loads that are measured before work begins"
    if not shard.num_experts or layout is None or layout.ranks == 1:
        return ""
    is_same = earlier is not None and earlier["fingerprint"] == job.fingerprint
    return placement_outlook(
        job,
        JobFolder(Path(job.spec.output.path)) if is_same else None,
        layout,
        ExpertLayers.of(job.model_path),
        rows_done=earlier["rows"]["done"] if earlier is not None and is_same else 0,
    )


def _weights(shard: Forecast) -> str:
    cost = shard.cost
    met = cost.weights_a_token + cost.output_weights
    return f"{cost.weights / 1e6:,.1f} M weights" + (
        f" of which a token meets {met / 1e6:,.1f} M" if met < 0.9 * cost.weights else ""
    )
