"""What `gristmill plan` says of where a job's gangs will hold their experts. Reads, and changes nothing."""

from __future__ import annotations

from jobs.experts.calibration_sample import calibration_sample
from jobs.experts.placements import MEASURED, ExpertLayers, last_that_fits, read_loads
from jobs.layout import Layout
from jobs.resolve import ResolvedJob
from pipeline.job_folder import JobFolder


def placement_outlook(
    job: ResolvedJob, folder: JobFolder | None, layout: Layout, experts: ExpertLayers, *, rows_done: int
) -> str:
    """For a layout of gangs of several shards on this machine, as `place_experts` will decide.

    `folder`: where this job ran before, if it did; `rows_done` of it there.
    """
    nodes = ["here"] * layout.ranks
    least = experts.least_slots(layout.ranks)
    slots = min(least + layout.spare_experts, experts.num_experts)
    asked = job.spec.cluster.calibration_rows
    sample = calibration_sample(job.splits, asked, rows_to_do=job.source.num_rows - rows_done)
    if folder is not None:
        origin = None if sample is None else MEASURED
        record = last_that_fits(folder, experts, nodes, slots=slots, origin=origin)
        if record is not None:
            return f"where an earlier gang held them ({record['origin']}{_foretold(record['predicted_balance'])})"
        if sample is not None and read_loads(folder, experts) is not None:
            return f"placed by the loads that an earlier gang measured{_slots(layout, slots - least)}"
    if sample is not None:
        rows = sum(place.rows for place in sample.places)
        return f"placed by measured loads: {rows:,} rows are read before work begins{_slots(layout, slots - least)}"
    why = "cluster.calibration_rows is 0" if asked == 0 else "the job is too small to measure loads"
    return f"dealt out in turn: {why}{_slots(layout, slots - least)}"


def _foretold(balance: float | None) -> str:
    return "" if balance is None else f", which foretold {balance:.2f} times the mean for the busiest shard"


def _slots(layout: Layout, spare: int) -> str:
    return f"; {spare or 'no'} more of a layer on each shard, for copies ({layout.why_spare})"
