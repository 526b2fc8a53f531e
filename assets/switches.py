"""Which schedules are on, as Dagster's instance has it stored; no experiment file is read."""

from collections.abc import Collection

import dagster as dg
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, ScheduleInstigatorData
from dagster._time import get_current_timestamp

from evolve_dag.config import scheduling


def switched_on(instance: dg.DagsterInstance) -> dict[str, InstigatorState]:
    """Schedule -> its state, of those that are on."""
    if instance.schedule_storage is None:  # an instance in memory
        return {}
    states = instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)
    return {state.name: state for state in states if state.is_running}


def switch_off(instance: dg.DagsterInstance, experiment: str) -> bool:
    """Switch an experiment's schedule off; returns whether it was on."""
    state = switched_on(instance).get(scheduling.schedule_name(experiment))
    if state is None:
        return False
    instance.stop_schedule(state.instigator_origin_id, state.selector_id)
    return True


def carry_over(instance: dg.DagsterInstance, experiments: Collection[str]) -> None:
    """Have schedules that are on under a name that an earlier version gave them be on under the one that they have now.

    Args:
        experiments: all that are known; a former name that several of them may have had says nothing about any of them.
    """
    on = switched_on(instance)
    former = [scheduling.former_name(name) for name in experiments]
    for name in experiments:
        before = scheduling.former_name(name)
        if before == scheduling.schedule_name(name) or before not in on or former.count(before) > 1:
            continue
        state = on[before]
        origin = state.origin._replace(instigator_name=scheduling.schedule_name(name))
        data = state.instigator_data
        if isinstance(data, ScheduleInstigatorData):  # no tick is made up for: those of before are not found under the new name
            data = data._replace(last_iteration_timestamp=get_current_timestamp())
        now = InstigatorState(origin, InstigatorType.SCHEDULE, InstigatorStatus.RUNNING, data)
        if instance.get_instigator_state(now.instigator_origin_id, now.selector_id) is None:
            instance.add_instigator_state(now)
        instance.stop_schedule(state.instigator_origin_id, state.selector_id)
