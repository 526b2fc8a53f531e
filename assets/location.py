"""The code location: assets, jobs, schedules and sensors over a store, for Dagster's processes and for ours."""

import dagster as dg
from evolve_dag.assets import alerts, automation, recovery
from evolve_dag.assets.loop import loop_assets
from evolve_dag.assets.resources import Session, StoreResource
from evolve_dag.assets.settings import settings_assets


def build(store: StoreResource | None = None, session: Session | None = None) -> dg.Definitions:
    """Assets, jobs and automation over a store.

    Args:
        store: default: ``EVOLVE_STORE``, else ``.evolve`` in the working folder.
        session: who runs the steps; default: Dagster itself. The command line hands in its own.
    """
    store = store or StoreResource()
    return dg.Definitions(
        assets=[*settings_assets, *loop_assets],
        jobs=[automation.iteration_job, automation.settings_job],
        schedules=[] if session else automation.nightly_schedules(store.path),
        sensors=[
            automation.config_watch,
            automation.continue_until,
            recovery.lost_runs,
            alerts.failure_watch,
            alerts.restore_watch,
        ],
        resources={"store": store, "session": session or Session()},
        # A process per step would cost 4-5 s each; in one process it is 0.3 s.
        executor=dg.in_process_executor,
    )
